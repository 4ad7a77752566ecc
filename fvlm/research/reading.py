"""The two sentences at the top of a report: what the numbers say, whichever way they point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fvlm.research.records import RunRecords

TASKS = {"slots": "words of list answers", "multiple_choice": "multiple-choice questions"}


def percent(share: float | None) -> str:
    """0.953 -> "95.3 %"."""
    return "–" if share is None else f"{100 * share:.1f} %"


def with_interval(figures: Mapping[str, Any] | None) -> str:
    """ "95.3 % [91.2–97.6]"; a dash where there are no figures."""
    if not figures:
        return "–"
    return f"{percent(figures['accuracy'])} [{100 * figures['low']:.1f}–{100 * figures['high']:.1f}]"


def headline_task(run: RunRecords, mode: str) -> str | None:
    """The task that speaks for the run in a mode: lists where they were asked, else multiple choice."""
    return next((task for task in TASKS if run.accuracy(task, mode)), None)


def reading(run: RunRecords, others: Sequence[RunRecords] = ()) -> str:
    """Two sentences: does looking help, and does it hold in deployment and against other runs."""
    return f"{_looking(run)} {_holds(run, others)}"


def _looking(run: RunRecords) -> str:
    task = headline_task(run, run.trained_mode)
    if task is None:
        return _looking_by_loss(run)
    own = run.accuracy(task, run.trained_mode)
    start = f"On held-out clips this model ({run.label}) gets {with_interval(own)} of the {TASKS[task]} right"
    chance = f"chance is {percent(own['chance'])}"
    if own["low"] <= own["chance"]:
        return f"{start}; {chance}, so it has not learned the task."
    coarse = run.accuracy(task, "coarse_only") if run.trained_mode != "coarse_only" else None
    if coarse is None:
        return f"{start}; {chance}."
    against = f"and {with_interval(coarse)} when the same weights look at every frame with one fixed query"
    return f"{start} {against} ({chance}): {_verdict(own, coarse)}."


def _verdict(fine: Mapping[str, float], coarse: Mapping[str, float]) -> str:
    if fine["low"] > coarse["high"]:
        return "its answers rest on where it looks"
    if fine["high"] < coarse["low"]:
        return "looking makes its answers worse"
    return "the intervals overlap, so this does not show that looking helps"


def _looking_by_loss(run: RunRecords) -> str:
    ratio = (run.mode("coarse_fine").get("loss") or {}).get("loss_ratio")
    if ratio is None:
        return "No accuracy and no loss by mode is on record, so nothing can be said about what looking is worth."
    change = abs(1 - ratio)
    word = "lower" if ratio < 1 else "higher"
    return (
        f"No accuracy is on record; the fine loss is {percent(change)} {word} than the coarse loss on the same labels."
    )


def _holds(run: RunRecords, others: Sequence[RunRecords]) -> str:
    task = headline_task(run, run.trained_mode)
    if task is None:
        return "Run `launch/evaluate.py` on its checkpoint for the three modes."
    parts = []
    own, stream = run.accuracy(task, run.trained_mode), run.accuracy(task, "autoregressive")
    if stream and run.trained_mode == "coarse_fine":
        parts.append(f"frame by frame, as in deployment, it gets {with_interval(stream)} ({_gap(own, stream)})")
    for other in others:
        figures = other.accuracy(task, other.trained_mode)
        if figures is None:
            parts.append(f"of the run {other.name!r} no such accuracy is on record")
        else:
            parts.append(f"{other.label}{_samples_note(run, other)} gets {with_interval(figures)}")
    if not parts:
        return "No other mode or run is on record to compare it with."
    text = "; ".join(parts)
    return text[0].upper() + text[1:] + "."


def _gap(own: Mapping[str, float], stream: Mapping[str, float]) -> str:
    points = 100 * (stream["accuracy"] - own["accuracy"])
    apart = stream["high"] < own["low"] or stream["low"] > own["high"]
    return f"{points:+.1f} points, {'more than' if apart else 'within'} the intervals"


def _samples_note(run: RunRecords, other: RunRecords) -> str:
    keys = ("train.total_samples", "train.seed", "data.train", "data.mixture")
    if all(run.setting(key) is not None and run.setting(key) == other.setting(key) for key in keys):
        return ", trained on the same samples,"
    return ", trained on other samples,"
