"""One throughput run: contenders built, raced and summed up, as `benchmarks.throughput` was asked to."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import throughput_report, throughput_steady
from benchmarks.mixes import Workload
from benchmarks.naive import NaiveVLM
from benchmarks.throughput_contenders import Contender, Naive, Product, Setting, planned_steps
from benchmarks.throughput_ladder import climb, describe, how_many_fit, rungs
from benchmarks.throughput_measure import TOLERANCE, Counts, Race, Schedule, largest_difference, ratios
from benchmarks.throughput_report import Peak
from fvlm.schema import ConfigError
from fvlm.train.engine import World
from fvlm.train.reference import TRAINING, reference_logprobs
from fvlm.train.zero_config import resolve_dtype

BATCH_SIZES = (8, 16, 32)
"""Of the baseline on a GPU, where the fastest that fits is taken."""


class Pace:
    """Stands in for the heartbeat of the reference's pass, and keeps when it was at which pack."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def beat(self, phase: str, step: int) -> None:
        """A pack is there."""
        self.times.append(time.perf_counter())

    def seconds_per_pack(self) -> float:
        """Of all but the last one, without what comes before the first. Raises ConfigError for fewer than two."""
        if len(self.times) < 2:
            raise ConfigError(f"the reference's pass takes {len(self.times)} packs: draw more --samples to time it")
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1)


class Benchmark:
    """One run: the workload, how contenders are built and raced, and what is known of it."""

    def __init__(self, asked: argparse.Namespace, workload: Workload, world: World):
        """`asked`: the command line of `benchmarks.throughput`."""
        self.asked, self.workload, self.world, self.device = asked, workload, world, world.device
        self.dtype = resolve_dtype(workload.config.train, world.device.type == "cuda")
        self.schedule = Schedule(warm_up=asked.warm_up, turns=-(-asked.steps // asked.turn), length=asked.turn)
        self.base = Setting(zero=asked.zero)
        self.tolerance = TOLERANCE[self.dtype]
        self.batch_size = asked.batch_size
        self.peak: Peak | None = None
        self.reference: np.ndarray | None = None
        self.figures: dict[str, Any] = {}

    def prepare(self) -> None:
        """What everybody needs before a race: the peak, the reference of `dpo`, the baseline's batch size."""
        self.look_at_peak()
        if self.workload.mix == "dpo":
            pace, sets = Pace(), {TRAINING: self.workload.data}
            found = reference_logprobs(self.workload.config, sets, self.world, False, pace)
            self.reference = found[TRAINING]
            self.figures["reference_s_per_pair"] = pace.seconds_per_pack() * len(pace.times) / len(self.reference)
        if self.batch_size is None:
            self.batch_size = self._fastest_batch_size()

    def look_at_peak(self) -> None:
        """The peak, or the larger one of two looks: where it is measured, something else may have been in the way."""
        found = Peak.of(self.device, self.dtype)
        if self.peak is None or found.flops > self.peak.flops:
            self.peak = found
        self.figures["peak_tflops"] = self.peak.flops / 1e12

    def _fastest_batch_size(self) -> int:
        seconds = {}
        for size in BATCH_SIZES:
            race = Race(self.device, Schedule(warm_up=1, turns=1, length=1), self.tolerance)
            try:
                race.enter("naive", lambda size=size: Naive(self.workload, NaiveVLM, self.world, size))
                seconds[size] = race.run()["naive"].seconds[0]
            except torch.OutOfMemoryError:
                print(f"baseline: batches of {size} do not fit", flush=True)
            finally:
                race.leave()
        if not seconds:
            raise ConfigError(f"the baseline does not fit in batches of {BATCH_SIZES[0]}; give a smaller --batch-size")
        shown = ", ".join(f"{size}: {found:.2f} s" for size, found in seconds.items())
        print(f"baseline: seconds of a step by batch size: {shown}", flush=True)
        return min(seconds, key=seconds.get)

    def build(self, what: type[NaiveVLM] | Setting) -> Contender:
        """A contender with the common weights, at the plan's first step."""
        if isinstance(what, Setting):
            return Product(self.workload, what, self.world, self.reference)
        return Naive(self.workload, what, self.world, self.batch_size)

    def race(self) -> Race:
        """An empty one."""
        return Race(self.device, self.schedule, self.tolerance)

    def counts(self, timed: Sequence[range], setting: Setting | None = None) -> list[Counts]:
        """Of each turn's timed steps."""
        steps = planned_steps(self.workload, timed[-1].stop)
        train = (setting or Setting()).of(self.workload.config).train
        of_step = [Counts.of(self.workload.geometry, self.workload.data.plan, step, train) for step in steps]
        return [Counts.sum([of_step[place] for place in turn]) for turn in timed]

    def rates(self, name: str, measured: Any, timed: Sequence[range], what: Any) -> dict[str, float]:
        """Flat figures of a contender."""
        setting = what if isinstance(what, Setting) else None
        counts = self.counts(timed, setting)
        return throughput_report.rates(name, measured, counts, self.peak, recomputes=setting is not None)

    def settings(self) -> dict[str, Any]:
        """What a result has to share with another one to be compared."""
        config = self.workload.config
        return {
            "model": self.workload.model, "mix": self.workload.mix, "dtype": self.dtype, "zero": self.asked.zero,
            "tokens": config.data.tokens, "packs_per_step": config.train.packs_per_step,
            "num_workers": config.data.num_workers, "batch_size": self.batch_size,
            "threads": torch.get_num_threads(), "overrides": self.asked.overrides,
        }  # fmt: skip


def compare(bench: Benchmark) -> tuple[list[dict], dict[str, Any]]:
    """(table, further entries of the record) of the baseline and the product as configured."""
    race, figures = bench.race(), bench.figures
    try:
        for name, what in (("naive", NaiveVLM), ("product", bench.base)):
            race.enter(name, lambda what=what: bench.build(what))
        found, timed = race.run(), race.timed()
        bench.look_at_peak()
        for name, what in (("naive", None), ("product", bench.base)):
            figures |= bench.rates(name, found[name], timed, what)
        speedup = ratios(found["naive"], found["product"])
        figures |= {"speedup": speedup.median, "speedup_p20": speedup.p20, "speedup_p80": speedup.p80}
        if bench.reference is not None:  # an epoch looks at each pair once, and so does the reference
            once = 1 / figures["product/samples_per_s"] + figures["reference_s_per_pair"]
            figures["speedup_with_reference"] = 1 / figures["naive/samples_per_s"] / once
        figures["loss_difference"] = largest_difference(found)
        steps = planned_steps(bench.workload, timed[-1].stop)
        figures |= throughput_steady.fill(bench.workload, [steps[place] for turn in timed for place in turn])
        counted, where = throughput_steady.count(race.contenders["product"], num_steps=2)
        figures |= counted
        figures["product/padding_in_attention"] = throughput_steady.padding_in_attention(race.contenders["product"])
    finally:
        race.leave()
    rows = [throughput_report.row(name, figures, {}) for name in found]
    losses = {name: each.losses for name, each in found.items()}
    seconds = {name: each.seconds for name, each in found.items()}
    return rows, {"host_syncs": where, "losses": losses, "seconds": seconds}


def climb_ladder(bench: Benchmark, stem: Path) -> tuple[list[dict], dict[str, Any]]:
    """(table, further entries of the record) of the ladder, with a plot at `stem`."""
    asked, figures = bench.asked, bench.figures
    ladder = rungs(bench.device.type == "cuda", bench.base)
    if asked.rungs:
        names = [rung.name for rung in ladder]
        if unknown := sorted(set(asked.rungs) - set(names)):
            raise ConfigError(f"--rungs {unknown[0]}: expected some of {', '.join(names)}")
        ladder = [rung for rung in ladder if rung.name in asked.rungs]
    weights = sum(file.stat().st_size for file in (bench.workload.folder / "weights").glob("*.safetensors"))
    together = asked.together or how_many_fit(weights, bench.device)
    climbed, not_run = climb(ladder, lambda rung: bench.build(rung.what), bench.race, together)
    bench.look_at_peak()
    for each in climbed:
        figures |= bench.rates(each.name, each.measured, each.timed, each.rung.what)
        figures |= {f"{each.name}/factor": each.factor.median, f"{each.name}/to_first": each.to_first}
    if not climbed:
        raise ConfigError(f"no rung of the ladder runs here: {not_run}")
    top = [each for each in climbed if not each.rung.is_side][-1]
    figures |= {"speedup": top.to_first, "top": top.name}
    title = f"{bench.workload.model}, {bench.workload.mix}: from {climbed[0].name} to {top.name}"
    print(f"plot: {throughput_report.plot(climbed, figures, title, stem)}")
    described = {each.name: describe(each.rung.what) for each in climbed}
    seconds = {each.name: each.measured.seconds for each in climbed}
    more = {"ladder": described, "not_run": not_run, "together": together, "seconds": seconds}
    return throughput_report.ladder_rows(climbed, not_run, figures), more
