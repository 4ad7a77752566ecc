"""From an ablation matrix the runs of a study: each arm is one change to the base, shown as what it changes."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fvlm.config import RunConfig, identity
from fvlm.research.ablation.matrix import Arm, Matrix, Needs, Rule, Start
from fvlm.research.study.plan import PlannedRun, run_config
from fvlm.schema import ConfigError, apply_override, require

START = "start"
"""Question of the runs that arms start from."""
ORDER_KEYS = (
    "data.train", "data.window", "train.seed", "train.total_samples",
    *(f"data.mixture.{each}" for each in ("weights", "text_share", "kinds", "caps", "repeats", "tag_caps", "missing")),
)  # fmt: skip
"""All that the order of samples depends on (`fvlm.data.order`)."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a matrix comes to on a base."""

    runs: list[PlannedRun]
    chosen: set[str]
    """Names of the runs to carry out now."""
    changes: dict[str, list[str]]
    """Arm → its differences from the base, a line each."""
    other_samples: set[str]
    """Arms that see other samples than the base, or in another order."""
    same_as: dict[str, str]
    """Arm → the arm before it that is the same on this base, and is run once."""
    left_out: dict[str, str]
    """Question or start → why."""

    def arm(self, name: str) -> str:
        """The arm whose runs stand for `name`."""
        return self.same_as.get(name, name)


def plan_ablations(
    matrix: Matrix,
    base: RunConfig,
    out: Path,
    *,
    only: Collection[str] = (),
    seeds: Sequence[int] = (),
    earlier: Sequence[PlannedRun] = (),
) -> Plan:
    """The runs of a matrix, each resolved against the base.

    Args:
        out: the study's folder, in which arms find the run that they start from.
        only: arms or questions to carry out; empty: all.
        seeds: of these, instead of the matrix's.
        earlier: the study's plan so far (`read_plan`), whose further seeds stay in it.

    Raises:
        ConfigError: a name that is not in the matrix, or an arm that cannot be.
    """
    wanted = _wanted(matrix, only)
    lacking = {name: _lacks(part.needs, base) for name, part in [*matrix.starts.items(), *matrix.questions.items()]}
    left_out = {name: reason for name, reason in lacking.items() if reason}
    places = {arm: name for name, question in matrix.questions.items() for arm in question.arms}
    found = Plan(runs=[], chosen=set(), changes={}, other_samples=set(), same_as={}, left_out=left_out)
    flat, by_identity = identity(base), {}
    for name, arm in matrix.arms.items():
        if left_out.get(places.get(name)):
            continue
        overrides, first = _overrides(name, arm, flat), _start(matrix, arm, base, matrix.seeds[0])
        probe = PlannedRun(name=name, overrides=(*overrides, *_from(first, out)), evaluate=arm.evaluate)
        resolved = identity(run_config(probe, base, out))
        key = json.dumps([resolved, arm.evaluate], sort_keys=True)
        if key in by_identity:
            found.same_as[name] = by_identity[key]
            continue
        by_identity[key] = name
        found.changes[name] = differences(flat, resolved)
        if any(resolved[each] != flat[each] for each in ORDER_KEYS):
            found.other_samples.add(name)
        labels = {"question": places.get(name, ""), "arm": name, "changed": "; ".join(found.changes[name])}
        labels["against"] = " ".join(_compared_with(matrix, name, places.get(name)))
        own = list(arm.seeds or matrix.seeds)
        asked = list(seeds or own) if name in wanted else []
        known = [int(run.name.rpartition("-s")[2]) for run in earlier if run.labels.get("arm") == name]
        for seed in sorted({*asked, *known, *([] if asked else own)}):
            start = _start(matrix, arm, base, seed)
            if start is not None and start not in found.runs:
                found.runs.append(start)
            run = PlannedRun(
                name=f"{name}-s{seed}",
                overrides=(*overrides, *_from(start, out), f"train.seed={seed}"),
                labels=labels,
                evaluate=arm.evaluate,
                after=start.name if start else None,
            )
            found.runs.append(run)
            if seed in asked:
                found.chosen.add(run.name)
    if stand_ins := {first for name, first in found.same_as.items() if name in wanted} - wanted:
        return plan_ablations(matrix, base, out, only=wanted | stand_ins, seeds=seeds, earlier=earlier)
    return found


def _compared_with(matrix: Matrix, name: str, question: str | None) -> list[str]:
    """Arms on the other side of the comparisons that its question makes of an arm."""
    pairs = [(pair.of, pair.against) for pair in matrix.comparisons(question)] if question else []
    return list(dict.fromkeys(other for pair in pairs if name in pair for other in pair if other != name))


def differences(base: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """`key: base → value` of every key that differs, the seed left out."""
    keys = [key for key in dict.fromkeys([*base, *other]) if base.get(key) != other.get(key) and key != "train.seed"]
    return [f"{key}: {json.dumps(base.get(key))} → {json.dumps(other.get(key))}" for key in keys]


def describe(plan: Plan, matrix: Matrix, base: RunConfig) -> Iterator[str]:
    """The plan, line by line: questions, rules, and each arm as what it changes."""
    seeds: dict[str, list[str]] = {}
    for run in plan.runs:
        seeds.setdefault(run.labels["arm"], []).append(run.name.rpartition("-s")[2])
    yield f"base {base.name}: {base.model.preset} {base.model.architecture}, {base.train.total_samples:,} samples a run"
    yield "the runs of a seed see the same samples in the same order, but for arms marked ~"
    yield f"{matrix.reference}: the base itself, seeds {', '.join(seeds[matrix.reference])}"
    for run in plan.runs:
        if run.labels["question"] == START:
            yield f"{run.name}: arms start from it; {run.labels['changed']}"
    for name in [name for name in matrix.starts if name in plan.left_out]:
        yield f"{name}: left out: {plan.left_out[name]}; the arms that start from it start as the base does"
    for name, question in matrix.questions.items():
        yield f"\n{name}: {question.asks}"
        yield f"  judged by {', else '.join(_words(rule) for rule in matrix.rules(name))}"
        for pair in question.compare:
            yield f"  {pair.of} against {pair.against}"
        if name in plan.left_out:
            yield f"  left out: {plan.left_out[name]}"
            continue
        for arm in question.arms:
            mark = "~" if arm in plan.other_samples else " "
            same, changed = plan.same_as.get(arm), plan.changes.get(arm, [])
            lines = [f"the same as {same} on this base"] if same else changed or ["as the base, asked otherwise"]
            yield f" {mark}{arm:10} {lines[0]}"
            yield from (f"  {'':10} {line}" for line in lines[1:])
            if not same and seeds[arm] != seeds[matrix.reference]:
                yield f"  {'':10} seeds {', '.join(seeds[arm])}"
    yield f"\n{len(plan.runs)} runs planned, {len(plan.chosen)} of them asked for now"


def _words(rule: Rule) -> str:
    return f"{rule.metric} ({rule.better} by more than {rule.margin:g})"


def _wanted(matrix: Matrix, only: Collection[str]) -> set[str]:
    if not only:
        return set(matrix.arms)
    wanted: set[str] = set()
    for name in only:
        known = name in matrix.arms or name in matrix.questions
        names = f"an arm ({', '.join(matrix.arms)}) or a question ({', '.join(matrix.questions)})"
        require(known, "only", name, names)
        wanted |= {name} if name in matrix.arms else set(matrix.questions[name].arms)
    return wanted


def _lacks(needs: Needs | None, base: RunConfig) -> str | None:
    """Why a base has not what is needed; None where it has."""
    tiny = base.model.is_tiny
    if needs == "real data" and tiny:
        return "it names sources of real data, and tiny models are for drawn clips"
    if needs == "drawn clips" and not tiny:
        return "its numbers are those of drawn clips and tiny models"
    if needs == "random weights" and not (tiny and base.init_from is None):
        return "the base does not begin with random weights"
    return None


def _overrides(name: str, arm: Arm | Start, base: Mapping[str, Any]) -> list[str]:
    """What the arm sets and scales, as key=value."""
    for override in arm.set:
        apply_override({}, override)  # raises where it is none
    scaled = []
    for key, factor in arm.scale.items():
        value = base.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"arm {name}: scale.{key} = {factor!r}: expected a key whose base value is a number, "
                              f"and it is {value!r}")  # fmt: skip
        scaled.append(f"{key}={float(f'{value * factor:.9g}')!r}")
    return [*arm.set, *scaled]


def _start(matrix: Matrix, arm: Arm, base: RunConfig, seed: int) -> PlannedRun | None:
    """The run of its own seed that an arm starts from; None where it starts as the base does."""
    if arm.after is None or _lacks(matrix.starts[arm.after].needs, base):
        return None
    overrides = _overrides(arm.after, matrix.starts[arm.after], identity(base))
    labels = {"question": START, "arm": arm.after, "changed": "; ".join(overrides)}
    return PlannedRun(name=f"{arm.after}-s{seed}", overrides=(*overrides, f"train.seed={seed}"), labels=labels)


def _from(start: PlannedRun | None, out: Path) -> list[str]:
    """The override that lets a run start from another one's weights; the same however `out` is spelled."""
    if start is None:
        return []
    place, here = Path(os.path.abspath(out / start.name)), Path.cwd()
    shown = place.relative_to(here) if place.is_relative_to(here) else place
    return [f"init_from={json.dumps(str(shown))}"]
