"""Losses over a fixed validation set: token means, by source, fine beside coarse, with the set's composition.

Every sum is kept in float64 and reduced over ranks before any division, so that one rank and several give the same
numbers up to the order of a float64 sum, and no batch weighs more than its tokens.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fvlm.evaluate.ranks import gather_over_ranks, sum_over_ranks, synchronize
from fvlm.evaluate.statistics import bootstrap_interval
from fvlm.model.packed import PackedBatch

GREY = 128


@dataclass(frozen=True, kw_only=True)
class LossReport:
    """Token-mean losses of one mode over a validation set; None where mode or architecture has no such figure."""

    mode: str
    fine_iterations: int
    blank: bool
    """True: every frame was replaced by mid-grey."""
    loss: float
    labels: int
    samples: int
    loss_coarse: float | None
    """The same labels with coarse tokens in the visual slots."""
    attention_entropy: float | None
    """Nats; mean over the mode's final queries of real visual slots, layers and heads."""
    loss_by_source: dict[str, float]
    coarse_by_source: dict[str, float]
    composition: dict[str, dict[str, float]]
    """Source -> {"samples", "labels", "share"}; share of the set's samples."""
    skipped: dict[str, int]
    interval: list[float] | None = None
    """95 % interval of the loss, by bootstrap over samples; None where it was not asked for."""
    interval_by_source: dict[str, list[float]] = field(default_factory=dict)
    seconds_per_sample: float
    """Device-seconds in the model, this report's extra figures included; `time_mode` measures the mode alone."""

    @property
    def loss_fine(self) -> float | None:
        """The loss where it comes from fine tokens."""
        return None if self.mode == "coarse_only" else self.loss

    @property
    def loss_ratio(self) -> float | None:
        """loss_fine / loss_coarse on the same labels; below 1, looking helps."""
        fine = self.loss_fine
        return None if fine is None or not self.loss_coarse else fine / self.loss_coarse

    def metrics(self) -> dict[str, float]:
        """The figures under the column names of metrics.csv, without those that do not exist in this mode."""
        named = {
            "val_loss": self.loss,
            "loss_fine": self.loss_fine,
            "loss_coarse": self.loss_coarse,
            "loss_ratio": self.loss_ratio,
            "attention_entropy": self.attention_entropy,
        }
        by_source = {f"val_loss/{source}": loss for source, loss in self.loss_by_source.items()}
        return {name: value for name, value in {**named, **by_source}.items() if value is not None}

    def as_dict(self) -> dict[str, Any]:
        """JSON-able, derived figures included."""
        return {**asdict(self), "loss_fine": self.loss_fine, "loss_ratio": self.loss_ratio}


def evaluate_losses(
    model: nn.Module,
    loader: Iterable,
    mode: str = "coarse_fine",
    fine_iterations: int = 1,
    *,
    source_names: Sequence[str],
    blank: bool = False,
    intervals: bool = False,
) -> LossReport:
    """Runs a validation set through the model, without gradient.

    Args:
        model: a fVLM model or the engine around it; switched to eval and back.
        loader: yields steps with `.batches` (this rank's `PackedBatch`es, on the model's device) and `.skipped`
            (Counter by reason). Every rank has to get the same number of batches.
        mode, fine_iterations: as in the model's call.
        source_names: name of each `source_id`.
        blank: replace all frames by mid-grey ones, and measure the loss alone: what text and habits are worth.
        intervals: also the losses' 95 % intervals, by bootstrap over samples.

    Raises:
        ValueError: the set holds no loss token, or a loss is not finite.
    """
    totals: Tensor | None = None
    by_sample: list[Tensor] = []
    skipped: Counter = Counter()
    with evaluating(model):
        for step in loader:
            skipped.update(step.skipped)
            for batch in step.batches:
                extras = {} if blank else {"entropy": True, "coarse_loss": mode == "coarse_fine"}
                call = {"mode": mode, "fine_iterations": fine_iterations, **extras}
                sums, samples = _batch_sums(model, _blanked(batch) if blank else batch, call, len(source_names))
                by_sample.append(samples)
                totals = sums if totals is None else totals + sums
    if totals is None:
        raise ValueError("evaluate_losses: the loader gave no batch; check the validation shards and their plan")
    totals = sum_over_ranks(totals).cpu()
    skipped = sum(gather_over_ranks(skipped), Counter())
    report = _report(totals, list(source_names), mode, fine_iterations, blank, skipped)
    return replace(report, **_intervals(by_sample, source_names)) if intervals else report


def time_mode(
    model: nn.Module, loader: Iterable, mode: str, fine_iterations: int = 1, *, most_batches: int = 4
) -> tuple[float, int]:
    """Device-seconds per sample of the mode's own forward pass: no coarse loss beside it, no entropy.

    One warm-up batch is not counted, unless it is the only one. Returns (seconds per sample, samples timed), the same
    on every rank.
    """
    seconds, samples, warm = 0.0, 0, False
    with evaluating(model):
        for batch in _first_batches(loader, most_batches):
            if not warm:
                model(batch=batch, mode=mode, fine_iterations=fine_iterations)
                warm = True
            start = _clock(batch)
            model(batch=batch, mode=mode, fine_iterations=fine_iterations)
            seconds += _clock(batch) - start
            samples += int((batch.source_id >= 0).sum())
            device = batch.frames.device
    if not warm:
        raise ValueError("time_mode: the loader gave no batch; check the validation shards and their plan")
    total = sum_over_ranks(torch.tensor([seconds, samples], dtype=torch.float64, device=device)).tolist()
    return total[0] / max(1.0, total[1]), int(total[1])


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradient inside; the model's own mode again afterwards, also after an error."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def label_samples(batch: PackedBatch) -> Tensor:
    """int64 [K]: which sample of the pack each label belongs to; meaningless where the label is unused."""
    ends = batch.cu_seqlens[1:].contiguous()
    row = batch.loss_index.to(ends.dtype)
    return torch.searchsorted(ends, row, right=True).clamp(max=len(ends) - 1)


def _batch_sums(
    model: nn.Module, batch: PackedBatch, call: Mapping[str, Any], num_sources: int
) -> tuple[Tensor, Tensor]:
    """Sums of a pack, and of its samples, all float64.

    [4 + 4 · sources]: entropy, queries, seconds, coarse labels; by source: loss, coarse, labels, samples.
    [S, 3]: source (-1 where there is no sample), loss, labels.
    """
    start = _clock(batch)
    out = model(batch=batch, **call)
    seconds = _clock(batch) - start
    used = batch.labels >= 0
    sample = label_samples(batch)[used]
    source = batch.source_id[sample]
    if bool((source < 0).any()) or bool((batch.source_id >= num_sources).any()):
        raise ValueError(
            f"evaluate_losses: source ids {sorted(set(batch.source_id.tolist()))} do not fit {num_sources} source_names"
        )
    coarse = out.coarse_logprobs if out.coarse_logprobs is not None else torch.zeros_like(out.logprobs)
    columns = torch.stack([-out.logprobs[used].double(), -coarse[used].double(), torch.ones_like(source).double()])
    by_source = torch.zeros(4, num_sources, dtype=torch.float64, device=source.device)
    by_source[:3].index_add_(1, source, columns)
    by_source[3] = torch.bincount(batch.source_id[batch.source_id >= 0], minlength=num_sources)
    head = torch.zeros(4, dtype=torch.float64, device=source.device)
    if out.attention_entropy is not None:
        real = batch.visual_index < len(batch.token_ids)
        head[0] = out.attention_entropy[real].double().sum()
        head[1] = real.sum()
    head[2] = seconds
    head[3] = used.sum() if out.coarse_logprobs is not None else 0
    by_sample = torch.zeros(len(batch.source_id), 3, dtype=torch.float64, device=source.device)
    by_sample[:, 0] = batch.source_id
    by_sample[:, 1:].index_add_(0, sample, columns[[0, 2]].T)
    return torch.cat([head, by_source.flatten()]), by_sample


def _intervals(by_sample: list[Tensor], names: Sequence[str]) -> dict[str, Any]:
    """ "interval" and "interval_by_source" from the sums of this rank's samples."""
    own = torch.cat(by_sample).cpu().numpy()
    rows = np.concatenate(gather_over_ranks(own[own[:, 2] > 0]))
    rows = rows[np.lexsort(rows.T)]  # the same order on any number of ranks
    groups = {names[source]: rows[rows[:, 0] == source] for source in np.unique(rows[:, 0]).astype(int)}
    return {
        "interval": list(bootstrap_interval(rows[:, 1], rows[:, 2])),
        "interval_by_source": {name: list(bootstrap_interval(g[:, 1], g[:, 2])) for name, g in groups.items()},
    }


def _report(
    totals: Tensor, names: list[str], mode: str, fine_iterations: int, blank: bool, skipped: Counter
) -> LossReport:
    entropy_sum, queries, seconds, coarse_labels = totals[:4].tolist()
    loss, coarse, labels, samples = totals[4:].view(4, len(names)).tolist()
    if not sum(labels):
        raise ValueError(f"evaluate_losses: no loss token in the validation set; skipped: {dict(skipped) or 'nothing'}")
    if not torch.isfinite(totals).all():
        raise ValueError(f"evaluate_losses: non-finite loss or entropy in mode {mode}; sums by source: {loss}")
    scored = [i for i in range(len(names)) if labels[i]]
    present = [i for i in range(len(names)) if samples[i]]
    has_coarse = coarse_labels > 0
    mean_coarse = (
        sum(coarse) / sum(labels) if has_coarse else (sum(loss) / sum(labels) if mode == "coarse_only" else None)
    )
    return LossReport(
        mode=mode,
        fine_iterations=fine_iterations,
        blank=blank,
        loss=sum(loss) / sum(labels),
        labels=int(sum(labels)),
        samples=int(sum(samples)),
        loss_coarse=mean_coarse,
        attention_entropy=entropy_sum / queries if queries else None,
        loss_by_source={names[i]: loss[i] / labels[i] for i in scored},
        coarse_by_source={names[i]: coarse[i] / labels[i] for i in scored} if has_coarse else {},
        composition={
            names[i]: {"samples": int(samples[i]), "labels": int(labels[i]), "share": samples[i] / sum(samples)}
            for i in present
        },
        skipped=dict(skipped),
        seconds_per_sample=seconds / max(1.0, sum(samples)),
    )


def _blanked(batch: PackedBatch) -> PackedBatch:
    if batch.frames.dtype != torch.uint8:
        raise ValueError(
            f"blank=True expects uint8 frames, got {batch.frames.dtype}: mid-grey of normalised frames is unknown"
        )
    return replace(batch, frames=torch.full_like(batch.frames, GREY))


def _first_batches(loader: Iterable, most: int) -> Iterator[PackedBatch]:
    count = 0
    for step in loader:
        for batch in step.batches:
            yield batch
            count += 1
            if count == most:
                return


def _clock(batch: PackedBatch) -> float:
    synchronize(batch.frames.device)
    return time.perf_counter()
