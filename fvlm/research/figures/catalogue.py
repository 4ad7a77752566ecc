"""All figures of a study from its CSVs alone, and `figures.md`, which lists them with captions, runs and commits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fvlm.research.figures import arm_figures, scaling_figures
from fvlm.research.report import write_text
from fvlm.research.sections import table
from fvlm.research.study.records import Drawn, NotDrawn, StudyRecords, read_study

LOSS = "validation loss, nats a token"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One figure: its file's name, its heading, and what draws it (study, path without suffix) or raises NotDrawn."""

    name: str
    title: str
    draw: Callable[[StudyRecords, Path], Drawn]


def _curve(title: str, name: str, column: str, ylabel: str, what: str, **options: Any) -> Plan:
    return Plan(name=name, title=title, draw=arm_figures.draw_curves(column, ylabel, what, **options))


PLANS = (
    _curve("Convergence by ablation", "convergence", "val_loss", LOSS, "Validation loss"),
    _curve("Accuracy by ablation", "accuracy", "accuracy", "held-out accuracy, %", "Held-out accuracy"),
    _curve(
        "Fine over coarse loss",
        "loss_ratio",
        "loss_ratio",
        "fine loss / coarse loss",
        "Fine over coarse loss on the same labels, where below 1 looking helps,",
        level=(1.0, "looking is worth nothing"),
    ),
    _curve(
        "Attention entropy", "entropy", "attention_entropy", "attention entropy, nats", "Entropy of the fine queries"
    ),
    Plan(name="arms", title="All arms at the end of training", draw=arm_figures.draw_arms),
    Plan(name="freeze", title="Freezing", draw=arm_figures.draw_freeze),
    Plan(name="modes", title="Three modes", draw=arm_figures.draw_modes),
    Plan(name="families", title="Where looking wins and loses: accuracy by family", draw=arm_figures.draw_families),
    Plan(
        name="family_losses", title="Where looking wins and loses: loss by family", draw=arm_figures.draw_family_losses
    ),
    *(
        Plan(name=f"attention-{number}", title="Attention heat maps", draw=arm_figures.draw_attention(number))
        for number in range(arm_figures.MOST_CLIPS)
    ),
    Plan(name="token_efficiency", title="Token-efficiency frontier", draw=scaling_figures.draw_efficiency),
    Plan(name="isoflop", title="Iso-FLOP curves", draw=scaling_figures.draw_isoflop),
    Plan(name="crossover", title="Foveated against baseline", draw=scaling_figures.draw_crossover),
    Plan(name="data_scaling", title="Data scaling", draw=scaling_figures.draw_data),
    Plan(name="allocation", title="Compute-optimal allocation", draw=scaling_figures.draw_allocation),
    Plan(name="parametric", title="Parametric fit", draw=scaling_figures.draw_parametric),
)


def write_figures(studies: Sequence[str | Path], out: str | Path) -> tuple[Path, int]:
    """Draws what each study's tables hold into `out`, beside `figures.md`; returns its path and how many were drawn.

    A figure that a study does not hold is listed with the reason, and never drawn empty. Raises FileNotFoundError where
    a study has no `results.csv`, ValueError for a table that cannot be read, or for two studies of one name.
    """
    out = Path(out)
    read = [read_study(study) for study in studies]
    names = [study.name for study in read]
    if len(set(names)) < len(names):
        raise ValueError(f"two studies are called {max(names, key=names.count)!r}: draw them into folders of their own")
    lines, undrawn, count = [], [], 0
    for plan in PLANS:
        shown = []
        for study in read:
            stem = plan.name if len(read) == 1 else f"{study.name}-{plan.name}"
            try:
                drawn = plan.draw(study, out / stem)
            except NotDrawn as reason:
                undrawn.append((plan.name, study.name, str(reason)))
                continue
            shown += _entry(study, plan.title, drawn)
            count += 1
        if shown:
            heading = [] if f"## {plan.title}" in lines else [f"## {plan.title}", ""]
            lines += heading + shown
    path = write_text(
        out / "figures.md", "\n".join([*_head(studies, read), *lines, *_undrawn(undrawn)]).rstrip() + "\n"
    )
    return path, count


def _head(paths: Sequence[str | Path], studies: Sequence[StudyRecords]) -> list[str]:
    rows = [
        (
            study.name,
            len(study.runs),
            sum(run.done for run in study.runs),
            ", ".join(study.commits) or None,
            ", ".join(study.missing) or None,
        )
        for study in studies
    ]
    text = (
        "Every figure is drawn from the studies' CSV files alone, by "
        f"`python launch/report.py --figures {' '.join(map(str, paths))}`. "
        "Under each stand the runs that are in it."
    )
    header = ("study", "runs planned", "done", "commit", "not on record")
    return ["# Figures", "", text, "", *table(header, rows)]


def _entry(study: StudyRecords, title: str, drawn: Drawn) -> list[str]:
    png, svg = (path.name for path in drawn.paths)
    runs = ", ".join(f"`{name}`" for name in drawn.runs)
    commits = f", commit {', '.join(study.commits)}" if study.commits else ""
    return [
        f"![{title}]({png})",
        "",
        f"*{drawn.caption}.* Study {study.name}{commits}; runs: {runs}. ([vector form]({svg}))",
        "",
    ]


def _undrawn(undrawn: Sequence[tuple[str, str, str]]) -> list[str]:
    if not undrawn:
        return []
    return ["## Not drawn", "", *table(("figure", "study", "why"), undrawn)]
