"""Steps that must not count: a loss or a gradient that is not finite or far above the ones before, and what to say.

Whether a step counts is decided on the device, in the midst of the optimizer's step (`Guard.verdict`), from values that
are kept there. The host reads it once the next step is under way, and says it; what else the policy asks for happens
then (`fvlm.train.loop`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fvlm.model.packed import PackedBatch
from fvlm.train_config import GuardConfig

if TYPE_CHECKING:
    from fvlm.train.engine import World

MOST_KEYS = 8
QUANTITIES = ("loss", "grad_norm")


class ScoredPack(NamedTuple):
    """What is kept of a micro-batch until the host has read whether its step counts; copies, all on the device."""

    cu_seqlens: Tensor
    loss_index: Tensor
    labels: Tensor
    logprobs: Tensor
    """float32 [K], of the labels."""
    keys: Sequence[str]
    """Of the samples."""

    @classmethod
    def of(cls, batch: PackedBatch, logprobs: Tensor, keys: Sequence[str]) -> ScoredPack:
        """Holds on to nothing of the pack's memory, which the next packs need."""
        copies = (x.detach().clone() for x in (batch.cu_seqlens, batch.loss_index, batch.labels, logprobs))
        return cls(*copies, keys)


class Judged(NamedTuple):
    """What a step was judged by, as the device left it."""

    loss: float
    grad_norm: float
    loss_mean: float
    """Over the window, as the next three; NaN before half of it is filled, or where nothing varies."""
    grad_norm_mean: float
    loss_sigma: float
    grad_norm_sigma: float
    loss_limit: float
    """The largest loss that counts; infinity where there is none yet."""
    grad_norm_limit: float
    left_out: float
    """1 for a step that does not count."""


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
        device: where steps are judged.
    """

    def __init__(self, config: GuardConfig, state: dict[str, Any], device: torch.device | str = "cpu"):
        self.config = config
        values = torch.zeros(2, config.window, dtype=torch.float64)  # the newest last
        known = state.get("window", dict.fromkeys(QUANTITIES, ()))
        for row, name in zip(values, QUANTITIES, strict=True):
            kept = known[name][-config.window :]
            row[config.window - len(kept) :] = torch.tensor(kept, dtype=torch.float64)
        self._values = values.to(device)
        self._age = torch.arange(config.window - 1, -1, -1, device=device)  # 0: the newest
        self._filled = torch.full((), len(kept), dtype=torch.int64, device=device)
        self._high = torch.full((), state.get("high_norms", 0), dtype=torch.int64, device=device)
        """Steps in a row that were left out for their gradient's norm alone."""
        self.judged = torch.zeros(len(Judged._fields), dtype=torch.float64, device=device)
        """Of the last step that was judged, as in Judged."""
        self.skipped_steps: int = state.get("skipped_steps", 0)
        self.in_a_row: int = state.get("in_a_row", 0)
        self.frozen: list[str] = list(state.get("frozen", ()))
        self.due: bool = state.get("due", False)
        """A step did not count, and what the policy asks for is still to be done: after the step that follows it."""

    def state(self) -> dict[str, Any]:
        """What a resumed run needs in order to judge as this one would; JSON-able. Waits for the device."""
        kept = self._values[:, self.config.window - int(self._filled) :].tolist()
        return {
            "window": dict(zip(QUANTITIES, kept, strict=True)),
            "high_norms": int(self._high),
            "skipped_steps": self.skipped_steps,
            "in_a_row": self.in_a_row,
            "frozen": list(self.frozen),
            "due": self.due,
        }

    def statistics(self) -> Tensor:
        """float64 [3, 2] on the device: mean, standard deviation and limit of each quantity, as in Judged.

        The order of the sums is that of the steps, so that a resumed run has the same numbers to the last bit.
        """
        newest = self._values[:, -1:]
        used = self._age < self._filled
        above = torch.where(used, self._values - newest, 0.0)  # of values that are all alike, exactly 0
        shift = above.sum(1, keepdim=True) / self._filled
        squares = torch.where(used, above - shift, 0.0).square().sum(1)
        mean, sigma = (newest + shift)[:, 0], (squares / (self._filled - 1)).sqrt()
        known = (self._filled >= max(2, self.config.window // 2)) & (sigma > 0)
        limit = mean + self.config.sigmas * sigma if self.config.sigmas else torch.full_like(mean, math.inf)
        return torch.stack([
            torch.where(known, mean, math.nan), torch.where(known, sigma, math.nan), torch.where(known, limit, math.inf)
        ])  # fmt: skip

    def verdict(self, loss: Tensor, anew: bool = False) -> Callable[[Tensor], Tensor]:
        """Judges a step from its gradient's norm: float32 scalar on the device, 1 where it must not count.

        `loss` is the step's, a scalar on the device; to be asked once a step. Nothing is read on the host. Values of a
        step that counts enter the window; others do not, so that a spike does not widen what follows. All ranks judge
        alike, since both values are sums over ranks. A norm that stays too large while the loss does not is no spike,
        but a new level (`new_level_after`): the window begins with it. `anew`: the window begins with this step, whose
        gradient is that of other parameters than before.
        """
        if anew:
            self._filled, self._high = torch.zeros_like(self._filled), torch.zeros_like(self._high)

        def judge(norm: Tensor) -> Tensor:
            here = norm.detach().to(self._values.device, torch.float64, non_blocking=True)
            values, statistics = torch.stack([loss.detach().double(), here]), self.statistics()
            finite, fits = values.isfinite().all(), values <= statistics[2]
            alone = finite & fits[0] & ~fits[1]
            if self.config.new_level_after:
                level = alone & (self._high >= self.config.new_level_after)
                statistics[2, 1] = torch.where(level, math.inf, statistics[2, 1])
                self._filled = torch.where(level, 0, self._filled)
            counts = finite & (values <= statistics[2]).all()
            self._high = torch.where(alone & ~counts, self._high + 1, 0)
            longer = torch.cat([self._values[:, 1:], values[:, None]], dim=1)
            self._values = torch.where(counts, longer, self._values)
            self._filled = (self._filled + counts).clamp(max=self.config.window)
            self.judged = torch.cat([values, statistics.flatten(), (~counts).double()[None]])
            return (~counts).float()

        return judge

    def observe(self, judged: Judged) -> Anomaly | None:
        """The host's side of `verdict`, from the same numbers: why the step did not count, or None.

        Raises RuntimeError where that is not what the device decided.
        """
        anomaly = next(filter(None, (_anomaly(judged, quantity) for quantity in QUANTITIES)), None)
        if bool(judged.left_out) != (anomaly is not None):
            raise RuntimeError(f"device and host disagree on {judged}: the host finds {anomaly or 'nothing unusual'}")
        self.due = anomaly is not None
        self.skipped_steps += self.due
        self.in_a_row = self.in_a_row + 1 if self.due else 0
        return anomaly

    def require_patience(self, message: str) -> None:
        """Raises DivergenceError where the policy, or the number of steps left out in a row, is to stop.

        `message`: what is wrong with the last one.
        """
        if self.config.policy == "stop":
            raise DivergenceError(
                f"{message}. The weights were not updated by it, the last checkpoint is sound: look at these samples "
                f"(launch/replay.py), lower train.learning_rate, or start again with another train.guard.policy"
            )
        if self.in_a_row >= self.config.max_skips:
            raise DivergenceError(
                f"{message}. That is {self.in_a_row} steps in a row without an update (train.guard.max_skips): "
                f"look at these samples (launch/replay.py), or lower train.learning_rate"
            )


def _anomaly(judged: Judged, quantity: str) -> Anomaly | None:
    value, limit = getattr(judged, quantity), getattr(judged, f"{quantity}_limit")
    if math.isfinite(value) and value <= limit:
        return None
    mean, sigma = getattr(judged, f"{quantity}_mean"), getattr(judged, f"{quantity}_sigma")
    known = not math.isnan(mean)
    return Anomaly(quantity=quantity, value=value, mean=mean if known else None, sigma=sigma if known else None)


def sample_losses(scored: Sequence[ScoredPack]) -> list[tuple[str, float]]:
    """(key, mean −log p over the sample's labels) of this rank's samples; NaN where it has no label."""
    found = []
    for pack in scored:
        labelled = pack.labels >= 0
        ends = pack.cu_seqlens[1:].long().contiguous()
        samples = torch.searchsorted(ends, pack.loss_index[labelled].contiguous(), right=True)
        sums = torch.bincount(samples, -pack.logprobs[labelled].double(), minlength=len(ends))
        means = sums / torch.bincount(samples, minlength=len(ends))
        found += zip(pack.keys, means[: len(pack.keys)].tolist(), strict=True)
    return found


def suspects(scored: Sequence[ScoredPack]) -> list[str]:
    """Keys of the samples with a label whose log-probability is not finite."""
    found = []
    for pack in scored:
        bad_rows = pack.loss_index[~torch.isfinite(pack.logprobs) & (pack.labels >= 0)]
        ends = pack.cu_seqlens[1:].long().contiguous()
        samples = torch.searchsorted(ends, bad_rows, right=True).unique().tolist()
        found += [pack.keys[sample] for sample in samples if sample < len(pack.keys)]
    return found


def account(scored: Sequence[ScoredPack], packs_per_step: int, world: World) -> list[dict[str, Any]]:
    """For each rank: numbers of its packs in the step, its samples' keys, and those under suspicion; collective.

    Under suspicion are the samples whose own loss is not finite; where there are none on any rank, nobody is.
    """
    packs = list(range(world.rank, packs_per_step, world.size))
    keys = [key for pack in scored for key in pack.keys]
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
