"""Steps that must not count: a loss or a gradient that is not finite or far above the ones before, and what to say.

Whether a step counts is decided on the device, in the midst of the optimizer's step (`Guard.verdict`); the limits come
from steps that the host has read before. What else the policy asks for happens after the step (`fvlm.train.loop`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fvlm.model.packed import PackedBatch
from fvlm.train_config import GuardConfig

if TYPE_CHECKING:
    from fvlm.train.engine import World

MOST_KEYS = 8
QUANTITIES = ("loss", "grad_norm")

Scored = Sequence[tuple[PackedBatch, Tensor, Sequence[str]]]
"""A rank's micro-batches of a step: the pack, the log-probabilities of its labels float32 [K], its samples' keys."""


class DivergenceError(RuntimeError):
    """The run is to stop for its loss or gradient; the weights are those of the last step that counted."""


class EvaluationError(RuntimeError):
    """The validation set cannot be scored: a score that is not finite, or no token with a label."""


@dataclass(frozen=True, kw_only=True)
class Anomaly:
    """Why a step does not count."""

    quantity: str
    """One of QUANTITIES."""
    value: float
    mean: float | None
    """Of the quantity over the window; None where the value is not finite or the window is young."""
    sigma: float | None

    def __str__(self) -> str:
        if self.mean is None or not math.isfinite(self.value):
            return f"{self.quantity} is {self.value}"
        above = (self.value - self.mean) / self.sigma  # sigma is above 0, or there is no limit
        return f"{self.quantity} is {self.value:.4g}, {above:.1f} sigma above {self.mean:.4g} (sigma {self.sigma:.3g})"

    def record(self) -> dict[str, Any]:
        """For `metrics.jsonl`; JSON knows no NaN, so that values that are not finite are text."""
        value = self.value if math.isfinite(self.value) else str(self.value)
        return {"quantity": self.quantity, "value": value, "mean": self.mean, "sigma": self.sigma}


def not_finite(norm: Tensor) -> Tensor:
    """float32 scalar on the device: 1 where the gradient's norm is NaN or infinite, else 0."""
    return (~torch.isfinite(norm)).float()


class Guard:
    """Judges steps by the last `window` ones that counted.

    Args:
        config: the run's `train.guard`.
        state: what `state` returned, of a run that is resumed; empty for a fresh one.
    """

    def __init__(self, config: GuardConfig, state: dict[str, Any]):
        self.config = config
        values = state.get("window", {})
        self._window = {name: deque(values.get(name, ()), maxlen=config.window) for name in QUANTITIES}
        self.skipped_steps: int = state.get("skipped_steps", 0)
        self.in_a_row: int = state.get("in_a_row", 0)
        self.frozen: list[str] = list(state.get("frozen", ()))

    def state(self) -> dict[str, Any]:
        """What a resumed run needs in order to judge as this one would; JSON-able."""
        return {
            "window": {name: list(values) for name, values in self._window.items()},
            "skipped_steps": self.skipped_steps,
            "in_a_row": self.in_a_row,
            "frozen": list(self.frozen),
        }

    def statistics(self, quantity: str) -> tuple[float, float] | None:
        """(mean, standard deviation) over the window; None before half of it is filled, or where nothing varies."""
        values = self._window[quantity]
        if len(values) < max(2, self.config.window // 2):
            return None
        mean = math.fsum(values) / len(values)
        sigma = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
        return (mean, sigma) if sigma > 0 else None

    def limit(self, quantity: str) -> float:
        """The largest value that counts; infinity where there is none yet."""
        statistics = self.statistics(quantity)
        if statistics is None or self.config.sigmas == 0:
            return math.inf
        return statistics[0] + self.config.sigmas * statistics[1]

    def verdict(self, loss: Tensor) -> Callable[[Tensor], Tensor]:
        """Judges a step from its gradient's norm: float32 scalar on the norm's device, 1 where it must not count.

        `loss` is the step's, a scalar on any device. Nothing is read on the host. All ranks judge alike, since both
        values are sums over ranks.
        """
        loss_limit, norm_limit = (self.limit(name) for name in QUANTITIES)

        def judge(norm: Tensor) -> Tensor:
            values = torch.stack([loss.detach().to(norm.device, torch.float64), norm.detach().double()])
            fine = torch.isfinite(values).all() & (values[0] <= loss_limit) & (values[1] <= norm_limit)
            return (~fine).float()

        return judge

    def observe(self, loss: float, norm: float) -> Anomaly | None:
        """The host's side of `verdict`, from the same values: why the step did not count, or None.

        Values of a step that counts enter the window; others do not, so that a spike does not widen what follows.
        """
        found = [self._anomaly(*pair) for pair in zip(QUANTITIES, (loss, norm), strict=True)]
        anomaly = next((one for one in found if one is not None), None)
        if anomaly is not None:
            self.skipped_steps += 1
            self.in_a_row += 1
            return anomaly
        self.in_a_row = 0
        for name, value in zip(QUANTITIES, (loss, norm), strict=True):
            self._window[name].append(value)
        return None

    def _anomaly(self, quantity: str, value: float) -> Anomaly | None:
        if math.isfinite(value) and value <= self.limit(quantity):
            return None
        mean, sigma = self.statistics(quantity) or (None, None)
        return Anomaly(quantity=quantity, value=value, mean=mean, sigma=sigma)


def sample_losses(scored: Scored) -> list[tuple[str, float]]:
    """(key, mean −log p over the sample's labels) of this rank's samples; NaN where it has no label."""
    found = []
    for batch, logprobs, keys in scored:
        labelled = batch.labels >= 0
        ends = batch.cu_seqlens[1:].long().contiguous()
        samples = torch.searchsorted(ends, batch.loss_index[labelled].contiguous(), right=True)
        sums = torch.bincount(samples, -logprobs[labelled].double(), minlength=len(ends))
        means = sums / torch.bincount(samples, minlength=len(ends))
        found += zip(keys, means[: len(keys)].tolist(), strict=True)
    return found


def suspects(scored: Scored) -> list[str]:
    """Keys of the samples with a label whose log-probability is not finite."""
    found = []
    for batch, logprobs, keys in scored:
        bad_rows = batch.loss_index[~torch.isfinite(logprobs) & (batch.labels >= 0)]
        ends = batch.cu_seqlens[1:].long().contiguous()
        samples = torch.searchsorted(ends, bad_rows, right=True).unique().tolist()
        found += [keys[sample] for sample in samples if sample < len(keys)]
    return found


def account(scored: Scored, packs_per_step: int, world: World) -> list[dict[str, Any]]:
    """For each rank: numbers of its packs in the step, its samples' keys, and those under suspicion; collective.

    Under suspicion are the samples whose own loss is not finite; where there are none on any rank, nobody is.
    """
    packs = list(range(world.rank, packs_per_step, world.size))
    keys = [key for _, _, names in scored for key in names]
    return world.gather({"rank": world.rank, "packs": packs, "keys": keys, "suspects": suspects(scored)})


def describe(ranks: Sequence[dict[str, Any]]) -> str:
    """`account` in one line: the suspects by rank, or every rank's first samples where nobody is suspected."""
    which = "suspects" if any(rank["suspects"] for rank in ranks) else "keys"
    named = []
    for rank in ranks:
        more = f", and {len(rank[which]) - MOST_KEYS} more" if len(rank[which]) > MOST_KEYS else ""
        if rank[which]:
            named.append(f"rank {rank['rank']}: {', '.join(rank[which][:MOST_KEYS])}{more}")
    return "; ".join(named) or "none"
