"""Go or no-go before a long run: each question of the check list, asked of studies and runs, with its evidence.

A question that nothing on record answers is `not measured`, which never counts as a pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fvlm.research.gonogo import rules
from fvlm.research.gonogo.rules import FAIL, NOT_MEASURED, PASS, Finding
from fvlm.research.records import RunRecords, read_run
from fvlm.research.sections import table
from fvlm.research.study.records import StudyRecords, read_study
from fvlm.research.study.rows import StudyRun, accuracy_spread, loss_spread
from fvlm.research.tables import Table


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A study or a run; exactly one of `study` and `run` is given."""

    name: str
    study: StudyRecords | None = None
    recipe: Sequence[StudyRun] = ()
    """The study's runs on which the decision rests."""
    run: RunRecords | None = None

    def judged(self) -> list[tuple[str, Table | None, Path | None]]:
        """(name, evaluations during training, folder) of each run that curves and logs are judged by."""
        if self.run is not None:
            return [(self.run.name, _losses(self.run), self.run.folder)]
        return [(run.name, self.study.curve(run), run.folder) for run in self.recipe]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One question, and the findings of every subject that it was asked of."""

    title: str
    rule: str
    findings: list[tuple[str, Finding]]
    by_all: bool = True
    """Whether every subject has to answer; else one is enough."""

    @property
    def outcome(self) -> str:
        """FAIL if one fails; PASS if one, or each where all have to, passes."""
        outcomes = [finding.outcome for _, finding in self.findings]
        if FAIL in outcomes:
            return FAIL
        enough = all if self.by_all else any
        return PASS if outcomes and enough(outcome == PASS for outcome in outcomes) else NOT_MEASURED


def _losses(run: RunRecords) -> Table | None:
    """Evaluations during training; `val_loss` is what falls where all is well: of preferences, the loss of pairs."""
    if run.setting("train.objective") != "dpo" or run.evaluations is None:
        return run.metrics
    columns = run.evaluations.columns
    pairs = {"samples_seen": columns.get("samples_seen", []), "val_loss": columns.get("preference/loss")}
    return None if pairs["val_loss"] is None else Table(pairs, run.evaluations.origin)


def open_subject(path: str | Path, arm: str | None = None) -> Subject:
    """A study's folder (it has `results.csv`), a CSV in its place, or a run's folder.

    Raises FileNotFoundError where it is neither, and ValueError for an `arm` that a study does not have.
    """
    path = Path(path)
    if path.is_file() or (path / "results.csv").is_file():
        study = read_study(path)
        return Subject(name=study.name, study=study, recipe=study.recipe(arm))
    run = read_run(path)
    return Subject(name=run.name, run=run)


def check(subjects: Sequence[Subject]) -> list[Check]:
    """The whole list."""
    studies = [subject for subject in subjects if subject.study is not None]
    return [
        Check(
            title="Fine beats coarse",
            rule="by accuracy, where it was measured: the 95 % intervals lie apart, fine above. Coarse is a model "
            "trained with one fixed query, else the same weights with it; several seeds count with the reach of all "
            f"their intervals. Else by loss: fine / coarse at most {rules.RATIO}",
            findings=[(subject.name, _fine_beats_coarse(subject)) for subject in subjects],
            by_all=False,
        ),
        Check(
            title="Curves converged",
            rule=f"at least {rules.LEAST_EVALUATIONS} evaluations, and the line through those of the last fifth of the "
            "run, from the last one before it on, promises a fall of the validation loss of at most "
            f"{rules.MOST_FALL:.0%} over a further fifth",
            findings=_of_runs(subjects, lambda curve, _: rules.converged(curve)),
        ),
        Check(
            title="No divergence",
            rule="no loss or gradient that is not finite, at most "
            f"{rules.MOST_LEFT_OUT:.0%} of the steps left out by the guard, and the last validation loss at most "
            f"{rules.MOST_RISE:.0%} above the lowest",
            findings=_of_runs(
                subjects, lambda curve, folder: rules.not_diverged(curve, folder and folder / "metrics.jsonl")
            ),
        ),
        Check(
            title="A compute-optimal point exists",
            rule="at the largest budget of a grid, the parabola of foveated models (`fits.json`) has its lowest loss "
            "within the sizes measured, and was not refused",
            findings=[(subject.name, rules.has_optimum(subject.study.fits)) for subject in studies],
            by_all=False,
        ),
        Check(
            title="Every log is there",
            rule="configuration, `metrics.csv`, `metrics.jsonl`, `data.csv`, summary, complete evaluation, attention "
            "maps and checkpoint manifest (a study removes the checkpoints that it evaluated), each with its fields",
            findings=_of_runs(subjects, lambda _, folder: _logs(folder)),
        ),
        Check(
            title="Every run is done",
            rule="all runs of a study that were begun are done, and one at least was; those that were left out "
            "(`--only`) are counted; a run has seen the samples that its configuration names",
            findings=[(subject.name, _done(subject)) for subject in subjects],
        ),
    ]


def _fine_beats_coarse(subject: Subject) -> Finding:
    if subject.run is not None:
        return rules.run_beats_coarse(subject.run)
    recipe, controls = subject.recipe, subject.study.controls()
    coarse = next((runs for kind, runs in controls.items() if "coarse only" in kind), None)
    whose = f"{coarse[0].arm}, trained with one query" if coarse else "the same weights"
    against, mode = (coarse, None) if coarse else (recipe, "coarse_only")
    fine = accuracy_spread(recipe, "coarse_fine")
    other = accuracy_spread(against, mode)
    if fine is not None and other is not None:
        return rules.fine_beats_coarse(rules.as_figures(fine), rules.as_figures(other), whose)
    fine, other = loss_spread(recipe, "coarse_fine"), loss_spread(against, mode)
    losses = [float("nan") if each is None else each.mean for each in (fine, other)]
    return rules.fine_beats_coarse_by_loss(*losses, whose)


def _of_runs(
    subjects: Sequence[Subject], judge: Callable[[Table | None, Path | None], Finding]
) -> list[tuple[str, Finding]]:
    """A finding for each run that the decision rests on; one of NOT_MEASURED for a subject without such a run."""
    found = []
    for subject in subjects:
        judged = subject.judged()
        found += [(name, judge(curve, folder)) for name, curve, folder in judged]
        if not judged:
            found.append((subject.name, Finding(NOT_MEASURED, "no run is done that the decision could rest on")))
    return found


def _logs(folder: Path | None) -> Finding:
    if folder is None:
        return Finding(NOT_MEASURED, "the run's folder is not at hand")
    missing = rules.missing_logs(folder)
    return Finding(FAIL, f"missing: {', '.join(missing)}") if missing else Finding(PASS, "all there")


def _done(subject: Subject) -> Finding:
    if subject.study is not None:
        counts = Counter(run.text("status") or "done" for run in subject.study.runs)
        words = {"not_run": "never begun"}
        evidence = ", ".join(f"{count} {words.get(status, status)}" for status, count in counts.items())
        return Finding(PASS if set(counts) - {"not_run"} == {"done"} else FAIL, evidence or "no runs planned")
    seen = (subject.run.summary or {}).get("samples_seen")
    planned = subject.run.setting("train.total_samples")
    if seen is None or planned is None:
        return Finding(NOT_MEASURED, "no run_summary.json, or no configuration")
    return Finding(PASS if seen >= planned else FAIL, f"{seen:,} of {planned:,} samples")


def go(checks: Sequence[Check]) -> bool:
    """Whether every question is answered with a pass."""
    return all(each.outcome == PASS for each in checks)


def as_markdown(subjects: Sequence[Subject], checks: Sequence[Check]) -> str:
    """Verdict, table of checks with evidence, what they were asked of, and the rules."""
    rows = [(each.title, f"**{each.outcome}**", _evidence(each)) for each in checks]
    asked = [_asked(subject) for subject in subjects]
    lines = [
        "# Go / no-go",
        "",
        verdict(checks),
        "",
        *table(("check", "outcome", "evidence"), rows),
        "What is not measured does not count as a pass.",
        "",
        "## What was asked",
        "",
        *(f"- {line}" for line in asked),
        "",
        "## How each is judged",
        "",
        *(f"- **{each.title}**: {each.rule}." for each in checks),
    ]
    return "\n".join(lines) + "\n"


def verdict(checks: Sequence[Check]) -> str:
    """One line."""
    if go(checks):
        return f"**Verdict: GO.** All {len(checks)} checks passed."
    parts = []
    for outcome in (FAIL, NOT_MEASURED):
        named = [each.title.lower() for each in checks if each.outcome == outcome]
        if named:
            parts.append(f"{outcome}: {', '.join(named)}")
    return f"**Verdict: NO-GO.** {'; '.join(parts).capitalize()}."


def _evidence(each: Check) -> str:
    """What decided comes first; equal words once."""
    order = (FAIL, NOT_MEASURED, PASS)
    grouped: dict[tuple[str, str], list[str]] = {}
    for name, finding in each.findings:
        grouped.setdefault((finding.outcome, finding.evidence), []).append(name)
    parts = sorted(grouped.items(), key=lambda item: (item[0][0] != each.outcome, order.index(item[0][0])))
    mixed = len({outcome for outcome, _ in grouped}) > 1
    return (
        "; ".join(
            f"{', '.join(names)}: {evidence}{f' ({outcome})' if mixed else ''}" for (outcome, evidence), names in parts
        )
        or "no study was given"
    )


def _asked(subject: Subject) -> str:
    if subject.run is not None:
        return f"run {subject.name} ({subject.run.folder})"
    names = ", ".join(run.name for run in subject.recipe) or "none is done"
    return f"study {subject.name} ({subject.study.folder}); curves and logs of the runs that it rests on: {names}"
