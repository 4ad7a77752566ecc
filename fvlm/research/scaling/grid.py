"""Scaling grids: sizes × budgets × architectures as the runs of a study, with the samples that a budget pays for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import product

from fvlm.config import CONFIGS, load_config
from fvlm.research.study.plan import PlannedRun
from fvlm.research.study.workload import StatedSample, Workload, workload
from fvlm.schema import ConfigError, apply_override, build, read_mapping, require, resolve


@dataclass(frozen=True, kw_only=True, slots=True)
class EqualSamples:
    """Further runs of one architecture, with as many samples as another has for the same budget."""

    architecture: str
    """Whose runs they are."""
    like: str
    """The architecture whose numbers of samples they take."""
    sizes: tuple[str, ...]
    """Names of sizes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GridConfig:
    """A grid file, `launch/configs/studies/grid*.yaml`."""

    base: str
    """Run configuration, a name or a file, that every run starts from."""
    sizes: dict[str, tuple[str, ...]]
    """Name → `key=value` on top of the base."""
    architectures: dict[str, tuple[str, ...]]
    """Name → `key=value`, likewise."""
    budgets: dict[str, float]
    """Name → operations of a run, forward and backward."""
    equal_samples: tuple[EqualSamples, ...] = ()
    """Runs beside the grid, of an equal number of samples instead of an equal budget."""
    evaluations: int = 5
    """Of each run during its training, about."""
    seeds: tuple[int, ...] = (42,)
    """Of every run of the grid."""
    evaluate: tuple[str, ...] = ()
    """Further arguments of launch/evaluate.py."""
    sample: StatedSample | None = None
    """The data's mean sample, to plan without them; null: the samples of the base's own plan."""

    def __post_init__(self) -> None:
        for name in ("sizes", "architectures", "budgets", "seeds"):
            require(len(getattr(self, name)) > 0, name, getattr(self, name), "at least one")
        for name, flops in self.budgets.items():
            require(flops > 0, f"budgets.{name}", flops, "operations, above 0")
        require(self.evaluations >= 1, "evaluations", self.evaluations, "at least 1")
        for place, extra in enumerate(self.equal_samples):
            for key in ("architecture", "like"):
                known = getattr(extra, key) in self.architectures
                require(known, f"equal_samples[{place}].{key}", getattr(extra, key), f"one of {[*self.architectures]}")
            known = set(extra.sizes) <= set(self.sizes)
            require(known, f"equal_samples[{place}].sizes", extra.sizes, f"some of {[*self.sizes]}")


GRID_KEYS = frozenset(f.name for f in fields(GridConfig))


@dataclass(frozen=True, kw_only=True)
class GridRun:
    """A run of the grid, and what it takes."""

    run: PlannedRun
    samples: int
    steps: int
    """About."""
    flops: float
    """Forward and backward, of all samples."""
    parameters: int


def load_grid(name: str, overrides: Sequence[str] = ()) -> tuple[GridConfig, list[str]]:
    """The grid file `name` (a path, or a bare name in launch/configs/studies), and the overrides that are its runs'.

    Overrides whose first key is one of the grid's (`sizes`, `budgets.C1`, `evaluations` …) change the grid.

    Raises ConfigError for a missing file, an unknown or missing key, or a value that cannot be.
    """
    values = read_mapping(resolve(name, CONFIGS / "studies", ".yaml"))
    of_runs = []
    for override in overrides:
        if override.partition("=")[0].partition(".")[0] in GRID_KEYS:
            apply_override(values, override)
        else:
            of_runs.append(override)
    return build(GridConfig, values), of_runs


def plan_grid(grid: GridConfig, overrides: Sequence[str] = ()) -> list[GridRun]:
    """All runs: by size, architecture, budget and seed, then those of equal samples.

    Args:
        grid: what varies.
        overrides: key=value on top of the grid's base, for every run.

    Raises ConfigError where a configuration cannot be, data are not there, or a budget is too small for a run.
    """
    works = {
        (size, kind): _workload(grid, [*overrides, *grid.sizes[size], *grid.architectures[kind]])
        for size, kind in product(grid.sizes, grid.architectures)
    }
    found = [
        _run(grid, size, kind, budget, seed, work, like=work)
        for ((size, kind), work), budget, seed in product(works.items(), grid.budgets, grid.seeds)
    ]
    for extra in grid.equal_samples:
        for size, budget, seed in product(extra.sizes, grid.budgets, grid.seeds):
            own, like = works[size, extra.architecture], works[size, extra.like]
            found.append(_run(grid, size, extra.architecture, budget, seed, own, like))
    return found


def _workload(grid: GridConfig, overrides: Sequence[str]) -> Workload:
    config = load_config(grid.base, overrides)
    try:
        return workload(config, grid.sample)
    except ConfigError as error:
        if grid.sample is not None:
            raise
        hint = "to plan without the data, state their mean sample: 'sample={frames: 7, text_tokens: 213, labels: 210}'"
        raise ConfigError(f"{error}; {hint}") from None


def _run(grid: GridConfig, size: str, kind: str, budget: str, seed: int, work: Workload, like: Workload) -> GridRun:
    """One run; `like`: whose samples it takes, its own or another architecture's."""
    samples = round(grid.budgets[budget] / like.flops_per_sample)
    steps = samples / work.samples_per_step
    name = f"{size}-{kind}-{budget}" + ("" if like is work else "-samples")
    least = f"a budget for {grid.evaluations} steps or more; {samples:,} samples of {size} make {steps:.1f}"
    require(steps >= grid.evaluations, f"budgets.{budget}", grid.budgets[budget], least)
    every = math.ceil(steps / grid.evaluations)
    own = (
        f"train.total_samples={samples}",
        f"train.eval_every={every}",
        f"train.checkpoint_every={every}",
        f"train.seed={seed}",
    )
    return GridRun(
        run=PlannedRun(
            name=f"{name}-s{seed}",
            overrides=(*grid.sizes[size], *grid.architectures[kind], *own),
            labels={
                "size": size,
                "model": kind,
                "budget": grid.budgets[budget],
                "comparison": "isoflop" if like is work else "isosample",
            },
            evaluate=grid.evaluate,
        ),
        samples=samples,
        steps=math.ceil(steps),
        flops=samples * work.flops_per_sample,
        parameters=work.parameters.total,
    )
