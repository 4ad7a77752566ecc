"""Contenders in turns: seconds, losses, waiting and memory of each, on the same steps."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from benchmarks.memory import resident
from benchmarks.throughput_contenders import Contender
from benchmarks.timing import Times, summary
from fvlm.data.plan import Plan, Step
from fvlm.model import FoveatedConfig
from fvlm.train.work import planned_flops
from fvlm.train_config import TrainConfig

TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
"""Largest |difference| / |loss| between contenders in any step; in bf16 roundings differ in every layer."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long is measured."""

    warm_up: int
    """Steps of each contender before anything is timed: compilers, allocators, optimizer states."""
    turns: int
    """Timed turns of each contender."""
    length: int
    """Timed steps of a turn."""


@dataclass(kw_only=True)
class Measured:
    """What was measured of one contender."""

    seconds: list[float] = field(default_factory=list)
    """Of each turn's timed steps."""
    waits: list[float] = field(default_factory=list)
    """Of these, waiting for data."""
    losses: list[float] = field(default_factory=list)
    """Of every step, the warm-up's too."""
    peak_bytes: int = 0
    """Most memory that was its own at a time."""


class Memory:
    """Memory of contenders that live side by side: the allocator's on a GPU, the resident set's on a CPU.

    What is there before a contender acts, and is not its own from before, is that of others. On the CPU the heap first
    gives back what is free in it, or another one's would be used again unseen; that takes time.
    """

    def __init__(self, device: torch.device):
        self._device, self._own = device, {}
        self.on_gpu = device.type == "cuda"

    def start(self, name: str) -> None:
        """`name` acts now."""
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the high-water mark starts anew
        self._before = self._now()
        self._others = self._before - self._own.get(name, 0)

    def stop(self, name: str) -> int:
        """`name` has acted: the most that it had at a time, bytes."""
        peak = torch.cuda.max_memory_allocated(self._device) if self.on_gpu else resident("VmHWM")
        self._own[name] = self._own.get(name, 0) + self._now() - self._before
        return peak - self._others

    def _now(self) -> int:
        return torch.cuda.memory_allocated(self._device) if self.on_gpu else resident("VmRSS")


class Race:
    """Contenders that train side by side, in turns, each turn in another order.

    In each turn some steps are not timed (`Contender.drain`, the largest of all), so that nobody lives on data that
    loader processes prepared while others were computing.
    """

    def __init__(self, device: torch.device, plan: Schedule, tolerance: float):
        self.plan, self.tolerance = plan, tolerance
        self.contenders: dict[str, Contender] = {}
        self.found: dict[str, Measured] = {}
        self._memory = Memory(device)

    def enter(self, name: str, build: Callable[[], Contender]) -> None:
        """Have another one take part, after its warm-up; one that cannot raises what it raises, and is out."""
        self._memory.start(name)
        contender = build()
        try:
            for _ in range(self.plan.warm_up):
                contender.step()
            contender.finish()
        except BaseException:
            contender.close()
            raise
        self.contenders[name] = contender
        self.found[name] = Measured(peak_bytes=self._memory.stop(name), losses=contender.losses)

    def run(self) -> dict[str, Measured]:
        """All turns. Raises RuntimeError where losses differ, after the turn in which they do."""
        names, drain = list(self.contenders), self.drain
        require_equal(self.found, self.tolerance)
        with tqdm(total=len(names) * self.plan.turns, desc="measuring", unit="turn", disable=None) as bar:
            for turn in range(self.plan.turns):
                for name in names if turn % 2 == 0 else reversed(names):
                    bar.set_postfix_str(name)
                    self._turn(name, drain)
                    bar.update()
                require_equal(self.found, self.tolerance)
        return self.found

    @property
    def drain(self) -> int:
        """Steps of a turn that are not timed."""
        return max(contender.drain for contender in self.contenders.values())

    def timed(self) -> list[range]:
        """The steps of each turn that were timed."""
        plan, drain = self.plan, self.drain
        starts = [plan.warm_up + turn * (drain + plan.length) + drain for turn in range(plan.turns)]
        return [range(start, start + plan.length) for start in starts]

    def _turn(self, name: str, drain: int) -> None:
        contender, found = self.contenders[name], self.found[name]
        if self._memory.on_gpu:
            self._memory.start(name)
        for _ in range(drain):
            contender.step()
        if drain:
            contender.finish()
        begin, waited = time.perf_counter(), 0.0
        for _ in range(self.plan.length):
            waited += contender.step()
        contender.finish()
        found.seconds.append(time.perf_counter() - begin)
        found.waits.append(waited)
        found.losses = contender.losses
        if self._memory.on_gpu:  # on a CPU the warm-up has shown it
            found.peak_bytes = max(found.peak_bytes, self._memory.stop(name))

    def leave(self) -> None:
        """All go; their memory is free."""
        for contender in self.contenders.values():
            contender.close()
        self.contenders.clear()
        free_memory()


def free_memory() -> None:
    """Give back what engines that nobody holds any more leave in cycles and caches."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def require_equal(found: Mapping[str, Measured], tolerance: float) -> None:
    """Raise RuntimeError, naming step and contenders, unless everybody's loss is the first one's, step for step."""
    first, *others = found
    for name in others:
        for step, (expected, got) in enumerate(zip(found[first].losses, found[name].losses, strict=True)):
            if not abs(got - expected) <= tolerance * abs(expected):  # NaN too
                raise RuntimeError(
                    f"step {step}: the loss of {name} is {got!r}, that of {first} {expected!r}; "
                    f"{tolerance:g} of it may differ: they do not train the same, and their speed says nothing"
                )


def largest_difference(found: Mapping[str, Measured]) -> float:
    """|difference| / |loss| from the first contender, over all others and steps."""
    first, *others = (each.losses for each in found.values())
    return max((abs(got / expected - 1) for other in others for got, expected in zip(other, first, strict=True)),
               default=0.0)  # fmt: skip


class Counts(NamedTuple):
    """Of some steps, over all packs."""

    samples: int
    frames: int
    tokens: int
    necessary: float
    """Operations, forward and backward."""
    executed: float
    """And what is computed again in the backward pass; nothing for padding."""

    @classmethod
    def of(cls, geometry: FoveatedConfig, plan: Plan, step: Step, train: TrainConfig) -> Counts:
        """One step's; a pair is one sample."""
        shares = (train.checkpointing.encoder, train.checkpointing.llm)
        work = [
            planned_flops(geometry, plan, pack, train.mode, train.fine_iterations[0], shares) for pack in step.packs
        ]
        necessary, executed = (sum(getattr(pack, name) for pack in work) for name in ("training", "executed"))
        frames, tokens = (sum(getattr(pack, name) for pack in step.packs) for name in ("frames", "tokens"))
        return cls(step.samples, frames, tokens, necessary, executed)

    @classmethod
    def sum(cls, counts: Sequence[Counts]) -> Counts:
        """Of several."""
        return cls(*map(sum, zip(*counts, strict=True)))


def ratios(slower: Measured, faster: Measured) -> Times:
    """Median and spread of seconds over seconds, turn by turn: on the same samples."""
    return summary([a / b for a, b in zip(slower.seconds, faster.seconds, strict=True)])
