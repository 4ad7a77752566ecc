"""What the ablations say: `ablations.md`, and the log of experiments, from a study's tables alone."""

from __future__ import annotations

import hashlib
import json
import math
import os
import statistics
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from fvlm.research.ablation.arms import Plan
from fvlm.research.ablation.matrix import Matrix
from fvlm.research.ablation.verdicts import ABSENT, NO, OPEN, YES, Comparison, Verdict, answer, judge, said
from fvlm.research.reading import percent, with_interval
from fvlm.research.sections import cell, table
from fvlm.research.study.records import StudyRecords, read_study
from fvlm.research.study.rows import StudyRun

LOG_HEAD = """# Experiments

One row a question each time its figures are new; rows are never changed, and what came to nothing stays.

| date | base | commit | question | asked | verdict | figures | key |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""
_FOLLOWS = {YES: "if_yes", NO: "if_no", OPEN: "if_open"}


def write_results(matrix: Matrix, plan: Plan, base: str, out: Path, log: Path) -> dict[str, list[Verdict]]:
    """Writes `out`/ablations.md and appends to the log; returns question → verdicts. `base`: the base's name.

    Raises FileNotFoundError without a results.csv, ValueError where a table cannot be read.
    """
    study = read_study(out)
    verdicts = {}
    for name in matrix.questions:
        pairs = [Comparison(of=plan.arm(p.of), against=plan.arm(p.against)) for p in matrix.comparisons(name)]
        if name not in plan.left_out:
            pairs = [pair for pair in pairs if pair.of != pair.against]
            verdicts[name] = [judge(study, pair, matrix.rules(name), len(pairs)) for pair in pairs]
    text = "\n".join(_page(matrix, plan, base, study, verdicts))
    temporary = out / "ablations.md.tmp"
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, out / "ablations.md")
    append_log(log, matrix, base, study, verdicts)
    return verdicts


def _page(
    matrix: Matrix, plan: Plan, base: str, study: StudyRecords, verdicts: dict[str, list[Verdict]]
) -> Iterable[str]:
    counts = {status: [run.text("status") for run in study.runs].count(status) for status in ("done", "failed")}
    commits = ", ".join(study.commits) or "unknown"
    yield from (
        f"# Ablations of {base}",
        "",
        f"{len(study.runs)} runs planned, {counts['done']} done, {counts['failed']} failed; commit {commits}. "
        "Intervals are 95 %: of one run over its validation questions, of a difference over questions and seeds. A "
        "difference is resolved where its interval lies on one side of the margin that the matrix stated beforehand.",
        "",
        "## Verdicts",
        "",
    )
    rows = []
    for name, found in verdicts.items():
        asked, answered = matrix.questions[name], answer(found) if found else ABSENT
        whole = answered == YES or ABSENT not in {each.answer for each in found}
        follows = (
            getattr(asked, _FOLLOWS[answered]) if answered in _FOLLOWS and whole else "Nothing yet: arms are missing."
        )
        rows.append([name, asked.asks, said(found), "; ".join(each.words() for each in found) or "–", follows])
    yield from table(["question", "asked", "verdict", "figures", "what follows"], rows)
    for name in [name for name in matrix.questions if name in plan.left_out]:
        yield f"Left out: {name} ({plan.left_out[name]})."
    for arm, same in plan.same_as.items():
        yield f"{arm} is the same as {same} on this base."
    yield from ("", "## Arms", "")
    arms = study.arms()
    header = ["arm", "change", "runs", "accuracy", "frame by frame", "val loss", "loss ratio", "steps", "FLOPs"]
    yield from table(header, [_arm_row(arm, runs) for arm, runs in arms.items()])
    chances = {run.number("chance") for run in study.done} - {math.nan}
    known = sorted(chance for chance in chances if math.isfinite(chance))
    if known:
        tasks = ", ".join(sorted({run.text("task") for run in study.done if run.text("task")}))
        yield f"Accuracy is of {tasks}, in the mode that was trained; chance is {' or '.join(map(percent, known))}."
    yield from ("", *_by_family(study, arms))
    missed = [run for run in study.runs if not run.done]
    if missed:
        yield from ("## Not done", "")
        yield from table(
            ["run", "status", "why"], [[r.name, r.text("status"), r.text("reason") or None] for r in missed]
        )


def _arm_row(arm: str, runs: Sequence[StudyRun]) -> list[object]:
    accuracies = [run.accuracy() for run in runs]
    streams = [run.accuracy("autoregressive") if run.mode == "coarse_fine" else None for run in runs]
    losses = [run.loss() for run in runs]
    shown = [_spread(found, "accuracy") for found in (accuracies, streams)]
    numbers = [_mean([run.number(name) for run in runs]) for name in ("loss_ratio", "steps", "train_flops")]
    seeds = ", ".join(run.text("seed") for run in runs)
    return [
        arm,
        runs[0].text("changed") or "–",
        f"{len(runs)} (seeds {seeds})",
        *shown,
        _spread(losses, "loss"),
        *numbers,
    ]


def _spread(figures: Sequence[dict[str, float] | None], name: str) -> str | None:
    """Mean ± standard deviation over seeds, or one run's value with its interval."""
    known = [each for each in figures if each is not None]
    if not known:
        return None
    form = percent if name == "accuracy" else "{:.4f}".format
    values, bounds = [each[name] for each in known], [known[0][bound] for bound in ("low", "high")]
    if len(values) > 1:
        return f"{form(statistics.fmean(values))} ± {form(statistics.stdev(values))} (n = {len(values)})"
    if not all(map(math.isfinite, bounds)):
        return form(values[0])
    return with_interval(known[0]) if name == "accuracy" else "{:.4f} [{:.4f}–{:.4f}]".format(values[0], *bounds)


def _mean(values: Sequence[float]) -> float | None:
    known = [value for value in values if math.isfinite(value)]
    return statistics.fmean(known) if known else None


def _by_family(study: StudyRecords, arms: dict[str, list[StudyRun]]) -> Iterable[str]:
    """Accuracy by source: an arm a row."""
    if study.families is None or "accuracy" not in study.families.columns:
        return
    asked = study.families
    pairs = zip(asked.text("task"), asked.text("source"), strict=True)
    sources = [pair for pair in dict.fromkeys(pairs) if pair[0] != "loss"]
    if not sources:
        return
    rows = []
    for arm, runs in arms.items():
        cells: list[object] = [arm]
        for task, source in sources:
            parts = [asked.where(run=run.name, mode=run.mode, task=task, source=source) for run in runs]
            known = [float(part.numbers("accuracy")[0]) for part in parts if len(part)]
            cells.append(percent(float(np.mean(known))) if known else None)
        rows.append(cells)
    yield from ("## By family", "", "Mean over seeds, in the mode that was trained.", "")
    yield from table(["arm", *(f"{source.removeprefix('synthetic/')} ({task})" for task, source in sources)], rows)


def append_log(log: Path, matrix: Matrix, base: str, study: StudyRecords, verdicts: dict[str, list[Verdict]]) -> int:
    """A row for each question whose figures, or the answer to them, are not in the log yet; returns how many.

    Nothing else in it is touched.
    """
    there = log.read_text(encoding="utf-8") if log.is_file() else ""
    rows = []
    for name, found in verdicts.items():
        if said(found) == ABSENT:
            continue
        key, figures = _key(name, study, found), "; ".join(each.words() for each in found)
        known = [line for line in there.splitlines() if line.endswith(f"| {key} |")]
        if known and f" | {cell(said(found))} | " in known[-1]:  # further seeds of other arms may change the answer
            continue
        commits, asked = ", ".join(study.commits), matrix.questions[name].asks
        values = [time.strftime("%Y-%m-%d"), base, commits, name, asked, said(found), figures, key]
        rows.append("| " + " | ".join(map(cell, values)) + " |\n")
    if rows:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as file:
            file.write(("" if there else LOG_HEAD) + "".join(rows))
    return len(rows)


def _key(question: str, study: StudyRecords, verdicts: Sequence[Verdict]) -> str:
    """8 hex digits of the question, the rule that decided, and every run and figure behind it."""
    arms = {arm for verdict in verdicts for arm in (verdict.comparison.of, verdict.comparison.against)}
    runs = [(run.name, run.text("config_hash")) for run in study.done if run.arm in arms]
    figures = [(v.rule.metric, v.rule.margin, v.sides[0].values, v.sides[1].values) for v in verdicts if v.sides]
    return hashlib.sha256(json.dumps([question, runs, figures]).encode()).hexdigest()[:8]
