"""From the baseline to the product, one change at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.naive import NaiveVLM
from benchmarks.naive_ladder import LADDER
from benchmarks.throughput_contenders import Contender, Setting
from benchmarks.throughput_measure import Measured, Race, free_memory, ratios
from benchmarks.timing import Times
from fvlm.schema import ConfigError
from fvlm.train_config import TrainConfig

SWITCHES = ("compile", "cuda_graphs")
"""Of `TrainConfig`: off in the rung `product`, then switched on one after the other."""
OPTIMIZERS = ("deepspeed_fused", "apex_fused")
"""For a GPU, beside the default."""
ZERO = ("zero0", "zero1", "zero2", "zero2_offload", "zero3")
"""DeepSpeed's JSONs; with offload the optimizer is DeepSpeed's for the CPU. ZeRO-3 is last: its memory stays taken."""
_SHARE = 0.3  # of the free memory for what contenders keep; the rest is for the activations of one


@dataclass(frozen=True)
class Rung:
    """A contender: a variant of the baseline, the product in a setting, or a change of the setting before."""

    name: str
    what: type[NaiveVLM] | Setting | Callable[[Setting], Setting]
    is_side: bool = False
    """Compared with the last rung that is none, and left again."""
    refused: str | None = None
    """Why it cannot run here, where that is known beforehand."""

    def after(self, last: Rung | None) -> Rung:
        """Itself, as it is after the last rung that ran and is no side. Raises ConfigError where it cannot follow."""
        if isinstance(self.what, (type, Setting)):
            return self
        if last is None or not isinstance(last.what, Setting):
            raise ConfigError(f"rung {self.name} changes a setting of the product: expected `product` before it")
        return replace(self, what=self.what(last.what))


@dataclass(frozen=True)
class Climbed:
    """A rung that was measured."""

    rung: Rung
    against: str | None
    """The rung that `factor` is over; None for the first one."""
    factor: Times
    """Seconds of `against` over its own, on the same samples in the same run."""
    to_first: float
    """How many times as fast as the first rung: the factors' product."""
    measured: Measured
    timed: list[range]
    """Its steps of each turn that were timed."""

    @property
    def name(self) -> str:
        """Of the rung."""
        return self.rung.name


def rungs(on_gpu: bool, base: Setting) -> list[Rung]:
    """Variants of the baseline, then the product with one setting after the other; last, others for its setting."""
    no_gpu = None if on_gpu else "there is no GPU"
    known = TrainConfig.__dataclass_fields__
    plain = replace(base, train={**base.train, **{name: False for name in SWITCHES if name in known}}, kernels="torch")
    found = [Rung(name, cls) for name, cls in LADDER.items()] + [Rung("product", plain)]
    no_kernels = None if on_gpu else "there is no GPU: without one `auto` is torch too"
    found.append(Rung("kernels", lambda before: replace(before, kernels="auto"), refused=no_kernels))
    for name in SWITCHES:
        missing = None if name in known else f"train.{name} does not exist in this version"
        refused = (no_gpu if name == "cuda_graphs" else None) or missing
        found.append(Rung(name, _with(**{name: True}), refused=refused))
    found += [Rung(name, _with(optimizer=name), is_side=True, refused=no_gpu) for name in OPTIMIZERS]
    for name in ZERO:
        changed = {"optimizer": "deepspeed_cpu"} if name.endswith("offload") else {}
        found.append(Rung(name, _with(name, **changed), is_side=True))
    return [rung for rung in found if rung.name != base.zero]


def _with(zero: str | None = None, **train: Any) -> Callable[[Setting], Setting]:
    return lambda before: replace(before, zero=zero or before.zero, train={**before.train, **train})


def climb(
    ladder: Sequence[Rung], build: Callable[[Rung], Contender], make_race: Callable[[], Race], together: int
) -> tuple[list[Climbed], dict[str, str]]:
    """(rungs that ran, name -> why it did not run for the others).

    At most `together` contenders, at least 2, are alive at a time; the last rung passed takes part in every race that
    follows, so that each factor is of two contenders in turns. Raises RuntimeError where losses differ.
    """
    if together < 2:
        raise ValueError(f"together = {together}: expected at least 2, each rung is compared with another")
    waiting, climbed, not_run = list(ladder), [], {}
    last: Rung | None = None
    while waiting:
        race, entered = make_race(), [last] if last else []
        try:
            if last:
                race.enter(last.name, lambda rung=last: build(rung))
            while waiting and len(race.contenders) < together:
                before = next((each for each in reversed(entered) if not each.is_side), None)
                rung, reason = _enter(race, waiting.pop(0), before, build)
                if reason:
                    not_run[rung.name] = reason
                else:
                    entered.append(rung)
            if len(entered) > (1 if last else 0):
                last = _account(race, entered, last, climbed)
        finally:
            race.leave()
    return climbed, not_run


def _enter(race: Race, rung: Rung, before: Rung | None, build: Callable[[Rung], Contender]) -> tuple[Rung, str | None]:
    """The rung as it follows `before`, and why it cannot run, or None: it takes part."""
    if rung.refused:
        return rung, rung.refused
    try:
        rung = rung.after(before)
        race.enter(rung.name, lambda: build(rung))
    except (ConfigError, RuntimeError, AssertionError) as error:  # no memory, what a compiler or DeepSpeed says
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    else:
        return rung, None
    free_memory()
    return rung, reason


def _account(race: Race, entered: Sequence[Rung], last: Rung | None, climbed: list[Climbed]) -> Rung:
    """Run a race, add what its rungs found, and return the last of them that is no side."""
    found, timed = race.run(), race.timed()
    to_first = {each.name: each.to_first for each in climbed}
    for rung in entered:
        if rung.name in to_first:  # the link to the race before
            continue
        factor = ratios(found[last.name], found[rung.name]) if last else Times(1.0, 1.0, 1.0)
        to_first[rung.name] = to_first[last.name] * factor.median if last else 1.0
        against = last.name if last else None
        climbed.append(Climbed(rung, against, factor, to_first[rung.name], found[rung.name], timed))
        if against:
            print(f"{rung.name}: {factor.median:.2f} times as fast as {against}", flush=True)
        last = last if rung.is_side else rung
    return last


def how_many_fit(weight_bytes: int, device: torch.device) -> int:
    """Contenders whose weights, gradients and moments, all fp32, find room side by side; at least 2."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _available()
    return max(2, int(_SHARE * free / (4.5 * weight_bytes)))


def _available() -> int:
    with open("/proc/meminfo", encoding="utf-8") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))


def describe(what: Any) -> str:
    """A rung's setting in one line, for the record."""
    if not isinstance(what, Setting):
        return f"benchmarks.naive_ladder.{what.__name__}"
    kernels = what.kernels or os.environ.get("FVLM_KERNELS", "auto")
    return ", ".join([f"{name}={value}" for name, value in what.train.items()] + [f"FVLM_KERNELS={kernels}", what.zero])
