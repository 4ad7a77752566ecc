"""What a step says of itself: numbers that leave the device behind the step, and are read while the next one runs."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from fvlm.data.plan import Step
from fvlm.train.guard import Judged, ScoredPack


@dataclass(frozen=True, kw_only=True)
class StepSums:
    """Sums of one step over all ranks and micro-batches, in the order in which they are added up on the device."""

    loss: float
    """Σ −log p with the mode's own tokens."""
    labels: float
    coarse: float
    """Same labels with coarse tokens; 0 unless the step was probed, or has a coarse loss anyway."""
    objective: float
    """What was minimised, before the division."""
    wait_seconds: float
    """Σ over ranks of the time spent waiting for data."""
    read_seconds: float
    """Σ over ranks of their workers' time in the step's packs."""
    decode_seconds: float
    """Of these, decoding JPEGs."""
    skipped: float
    """Samples lost while reading."""
    pairs: float
    """Of `dpo`, and the next three: sums over the pairs (`fvlm.train.preference.Preferences`); else 0."""
    reward_chosen: float
    reward_rejected: float
    correct: float
    told: float
    """Ranks that were told to stop."""
    written: float
    """Ranks that have written their files of the checkpoint under way."""

    @property
    def train_loss(self) -> float:
        """What was minimised, per pair or per label."""
        return self.objective / max(1.0, self.pairs or self.labels)

    def figures(self, coarse_only: bool, with_coarse: bool, num_ranks: int) -> dict[str, float | None]:
        """What a record says of them: means, and seconds.

        `coarse_only`: the mode's own tokens are coarse ones; `with_coarse`: `coarse` was measured.
        """
        labels = max(1.0, self.labels)
        own_loss, coarse = self.loss / labels, self.coarse / labels
        return {
            "train_loss": self.train_loss,
            **self._rewards(),
            "loss_fine": None if coarse_only else own_loss,
            "loss_coarse": own_loss if coarse_only else coarse if with_coarse else None,
            "loss_ratio": own_loss / coarse if with_coarse and coarse else None,
            "labels": int(self.labels),
            "data_wait_sec": self.wait_seconds / num_ranks,
            "read_sec": self.read_seconds,
            "decode_sec": self.decode_seconds,
        }

    def _rewards(self) -> dict[str, float]:
        """Means over the step's pairs; empty without pairs."""
        if not self.pairs:
            return {}
        return {
            "reward_chosen": self.reward_chosen / self.pairs,
            "reward_rejected": self.reward_rejected / self.pairs,
            "reward_margin": (self.reward_chosen - self.reward_rejected) / self.pairs,
            "reward_accuracy": self.correct / self.pairs,
        }


PLACES = {field.name: place for place, field in enumerate(fields(StepSums))}
"""Where each sum stands among a step's totals."""


class Mailbox:
    """Numbers on their way from the device, of two steps at most: those of the next may be sent before a reading."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        shape = 2, len(PLACES) + len(Judged._fields)
        self._host = torch.zeros(shape, dtype=torch.float64, pin_memory=self._cuda)
        self._rows = self._host.numpy()  # the same memory
        self._sent = 0

    def send(self, totals: Tensor, judged: Tensor) -> Letter:
        """Copy both, float64 on the device, behind everything that the device still has to do; nothing is waited for.

        `totals` [len(PLACES)] as in StepSums; `judged` as `fvlm.train.guard.Guard` leaves it.
        """
        row, self._sent = self._sent % 2, self._sent + 1
        self._host[row].copy_(torch.cat([totals, judged]), non_blocking=True)
        arrived = torch.cuda.current_stream(totals.device).record_event() if self._cuda else None
        return Letter(self._rows[row], arrived, time.perf_counter())


class Letter:
    """Numbers of one step; to be read before those of the next but one are sent."""

    def __init__(self, row, arrived: torch.cuda.Event | None, sent: float):
        self._row, self._arrived, self._sent = row, arrived, sent

    def read(self) -> tuple[StepSums, Judged, float]:
        """The step's sums, what the guard judged it by, and when it was done (`time.perf_counter`).

        Waits until the device is through with the step.
        """
        done = self._sent
        if self._arrived is not None:
            self._arrived.synchronize()
            done = time.perf_counter()
        numbers = self._row.tolist()
        return StepSums(**dict(zip(PLACES, numbers, strict=False))), Judged(*numbers[len(PLACES) :]), done


@dataclass(frozen=True, kw_only=True)
class Launched:
    """A step that was given to the device; the host knows neither its sums nor whether it counts."""

    step: Step
    lost: Counter
    """This rank's samples that could not be read, by reason."""
    scored: list[ScoredPack]
    probed: bool
    """Whether the coarse loss was measured on its own."""
    frozen: tuple[str, ...]
    """Parts that the guard had excluded from updates by then."""
    letter: Letter
