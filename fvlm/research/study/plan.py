"""What a study runs: configurations on top of one base, written down in `plan.json` and `base.yaml` of its folder."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fvlm.config import RunConfig, config_hash, override_config, save_config
from fvlm.research.records import read_json
from fvlm.schema import ConfigError, require
from fvlm.train.describe import commit, write_json

PLAN, BASE = "plan.json", "base.yaml"


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One run of a study."""

    name: str
    """Its folder below the study's."""
    overrides: tuple[str, ...] = ()
    """key=value on top of the base."""
    labels: dict[str, Any] = field(default_factory=dict)
    """What the run is, as columns of results.csv."""
    evaluate: tuple[str, ...] = ()
    """Further arguments of launch/evaluate.py."""
    after: str | None = None
    """A run that has to be done before, since this one starts from its weights."""


def run_config(run: PlannedRun, base: RunConfig, out: Path) -> RunConfig:
    """The run's whole configuration; raises ConfigError naming the run."""
    where = [f"name={json.dumps(run.name)}", f"out={json.dumps(str(out / run.name))}"]
    try:
        return override_config(base, [*run.overrides, *where])
    except ConfigError as error:
        raise ConfigError(f"run {run.name}: {error}") from None


def write_plan(runs: Sequence[PlannedRun], base: RunConfig, out: Path) -> dict[str, RunConfig]:
    """Writes `base.yaml` and `plan.json`, each by rename; returns every run's configuration.

    Raises ConfigError where a run cannot be, or where `out` holds a study of another base.
    """
    require_base(base, out)
    out.mkdir(parents=True, exist_ok=True)
    temporary = out / f"{BASE}.tmp"
    save_config(base, temporary)
    os.replace(temporary, out / BASE)
    configs = {run.name: run_config(run, base, out) for run in runs}
    listed = [{key: value for key, value in asdict(run).items() if key != "after" or value} for run in runs]
    write_json(out / PLAN, {"base": base.name, "base_hash": config_hash(base), "commit": commit(), "runs": listed})
    return configs


def require_base(base: RunConfig, out: Path) -> None:
    """Raises ConfigError where `out` holds a study of another base."""
    if (out / PLAN).is_file():
        known, digest = read_json(out / PLAN).get("base_hash"), config_hash(base)
        require(known in (None, digest), "out", str(out), f"a new folder, or one with a study of base {digest}: it "
                f"holds one of base {known}; repeat the key=value it was begun with, or choose another")  # fmt: skip


def read_plan(out: Path) -> list[PlannedRun]:
    """The runs that `out` has in its plan; none where there is no plan yet."""
    if not (out / PLAN).is_file():
        return []
    runs = read_json(out / PLAN)["runs"]
    return [
        PlannedRun(**{key: tuple(value) if isinstance(value, list) else value for key, value in run.items()})
        for run in runs
    ]


def with_needed(names: Iterable[str], runs: Sequence[PlannedRun]) -> set[str]:
    """`names` and the runs that they start from; raises ConfigError for a name that is not planned."""
    _require_runs(runs)
    by_name, chosen = {run.name: run for run in runs}, set()
    for name in names:
        require(name in by_name, "only", name, f"one of the planned runs: {', '.join(by_name)}")
        following: str | None = name
        while following is not None and following not in chosen:
            chosen.add(following)
            following = by_name[following].after
    return chosen


def _require_runs(runs: Sequence[PlannedRun]) -> None:
    require(bool(runs), "runs", list(runs), "at least one")
    seen: set[str] = set()
    for run in runs:
        fits = bool(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", run.name))
        require(fits, "run", run.name, "a folder's name of letters, digits and . _ + -")
        require(run.name not in seen, "run", run.name, "a name that no other run has")
        require(
            run.after is None or run.after in seen, f"run {run.name}: after", run.after, "a run earlier in the plan"
        )
        seen.add(run.name)
