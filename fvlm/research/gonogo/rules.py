"""What is asked of a run before a longer one is begun, each question answered from records: pass, fail, not measured.

The rules are stated here once, with their thresholds; `fvlm.research.gonogo.checks` asks them of studies and runs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fvlm.research.reading import headline_task, with_interval
from fvlm.research.records import RunRecords
from fvlm.research.scaling.fits import Estimate
from fvlm.research.study.rows import Spread
from fvlm.research.tables import Table, read_csv, read_jsonl
from fvlm.train.metrics import CSV_COLUMNS

PASS, FAIL, NOT_MEASURED = "pass", "fail", "not measured"
LAST_PART = 0.2
"""Share of the run, its last, by which a curve counts as converged."""
LEAST_EVALUATIONS = 5
MOST_FALL = 0.02
"""Largest fall of the loss, as a share of it, that the last part's slope may still promise over a fifth of the run."""
MOST_RISE = 0.05
"""Largest share by which the last validation loss may lie above the lowest one."""
MOST_LEFT_OUT = 0.01
"""Largest share of steps that the guard may have left out."""
RATIO = 0.99
"""Largest fine/coarse loss that counts as better, where no intervals are on record."""

STEP_FIELDS = (
    "step", "samples_seen", "train_loss", "loss_fine", "loss_coarse", "loss_ratio", "grad_norm", "lr_connector",
    "lr_dino", "lr_llm", "throughput_samples_sec", "tokens_sec", "mfu", "gpu_mem_allocated_gb", "gpu_mem_reserved_gb",
    "data_wait_sec",
)  # fmt: skip
SUMMARY_FIELDS = (
    "run_id", "config_hash", "commit", "steps", "samples_seen", "wall_time_sec", "final_metrics", "best",
    "convergence_step", "environment",
)  # fmt: skip


class Finding(NamedTuple):
    """The answer to one question about one subject."""

    outcome: str
    """PASS, FAIL or NOT_MEASURED."""
    evidence: str


def fine_beats_coarse(fine: Mapping[str, float] | None, coarse: Mapping[str, float] | None, what: str) -> Finding:
    """By accuracy: passes where the two 95 % intervals, {"accuracy", "low", "high"}, lie apart, fine above."""
    if fine is None or coarse is None:
        return Finding(NOT_MEASURED, f"no accuracy of fine and of {what}")
    if not all(math.isfinite(each[bound]) for each in (fine, coarse) for bound in ("low", "high")):
        return Finding(NOT_MEASURED, f"accuracies of fine and of {what} without intervals")
    evidence = f"{with_interval(fine)} against {with_interval(coarse)} of {what}"
    if fine["low"] > coarse["high"]:
        return Finding(PASS, evidence)
    return Finding(FAIL, f"{evidence}: {'below' if fine['high'] < coarse['low'] else 'the intervals overlap'}")


def fine_beats_coarse_by_loss(fine: float, coarse: float, what: str) -> Finding:
    """Where there is no accuracy: passes where fine / coarse is at most RATIO."""
    if not (math.isfinite(fine) and math.isfinite(coarse)):
        return Finding(NOT_MEASURED, f"neither accuracy nor loss of fine and of {what}")
    ratio = fine / coarse
    return Finding(PASS if ratio <= RATIO else FAIL, f"loss {fine:.4f} against {coarse:.4f} of {what}: {ratio:.3f}")


def run_beats_coarse(run: RunRecords) -> Finding:
    """Of one run: its weights in the mode coarse→fine beside the same weights with one fixed query."""
    if run.setting("model.architecture") == "multi_token":
        return Finding(NOT_MEASURED, "a model without queries")
    task = headline_task(run, "coarse_fine")
    if task is not None:
        return fine_beats_coarse(
            run.accuracy(task, "coarse_fine"), run.accuracy(task, "coarse_only"), "the same weights"
        )
    losses = [(run.mode(mode).get("loss") or {}).get("loss", math.nan) for mode in ("coarse_fine", "coarse_only")]
    return fine_beats_coarse_by_loss(*losses, "the same weights")


def as_figures(spread: Spread | None) -> dict[str, float] | None:
    """The seeds' accuracy as one: their mean within the reach of all their intervals."""
    if spread is None:
        return None
    low, high = (spread.low, spread.high) if spread.bounded else (math.nan, math.nan)
    return {"accuracy": spread.mean, "low": low, "high": high}


def converged(curve: Table | None) -> Finding:
    """Passes where the line through the evaluations of the last fifth of the run, from the last one before it on,
    promises a fall of the validation loss of at most MOST_FALL over a further fifth of the run."""
    if curve is None or any(name not in curve.columns for name in ("samples_seen", "val_loss")):
        return Finding(NOT_MEASURED, "no validation loss over training")
    samples, loss = curve.numbers("samples_seen"), curve.numbers("val_loss")
    keep = np.isfinite(samples) & np.isfinite(loss)
    samples, loss = samples[keep], loss[keep]
    if len(loss) < LEAST_EVALUATIONS:
        return Finding(NOT_MEASURED, f"{len(loss)} evaluation(s), {LEAST_EVALUATIONS} are needed")
    before = int(np.searchsorted(samples, (1 - LAST_PART) * samples[-1] * (1 + 1e-9), side="right")) - 1
    count = len(loss) - min(max(before, 0), len(loss) - 2)
    slope = np.polyfit(samples[-count:], loss[-count:], 1)[0]
    fall = float(-slope * LAST_PART * samples[-1] / loss[-1])
    evidence = f"{'falling' if fall > 0 else 'rising'} {abs(fall):.1%} a fifth of the run (last {count} evaluations)"
    return Finding(PASS if fall <= MOST_FALL else FAIL, evidence)


def not_diverged(curve: Table | None, jsonl: Path | None) -> Finding:
    """Passes where no loss or gradient was NaN or infinite, the guard left out at most MOST_LEFT_OUT of the steps, and
    the last validation loss is at most MOST_RISE above the lowest."""
    risen = _rise(curve)
    if risen is not None and not risen <= MOST_RISE:
        return Finding(
            FAIL, "a validation loss is not finite" if math.isnan(risen) else f"val_loss ends {risen:.1%} up"
        )
    if jsonl is None or not jsonl.is_file():
        return Finding(NOT_MEASURED, "no metrics.jsonl with steps and the guard's records")
    steps, guarded = read_jsonl(jsonl, "step"), read_jsonl(jsonl, "guard")
    if not len(steps) or risen is None:
        return Finding(NOT_MEASURED, "no steps in metrics.jsonl" if risen is not None else "no validation loss")
    broken = _not_finite(steps, ("train_loss", "grad_norm"))
    if broken:
        return Finding(FAIL, f"{broken} step(s) with a loss or gradient that is not finite")
    last = int(np.nanmax(steps.numbers("step")))
    share = len(guarded) / max(1, last)
    evidence = f"{len(guarded)} of {last} steps left out by the guard, val_loss ends {risen:.1%} above its lowest"
    return Finding(PASS if share <= MOST_LEFT_OUT else FAIL, evidence)


def _rise(curve: Table | None) -> float | None:
    """Last over lowest validation loss, minus 1; NaN where a cell is not finite, None without a curve."""
    if curve is None or "val_loss" not in curve.columns:
        return None
    given = np.array([bool(cell.strip()) for cell in curve.text("val_loss")], bool)
    loss = curve.numbers("val_loss")[given]
    if not len(loss):
        return None
    return float(loss[-1] / loss.min() - 1) if np.isfinite(loss).all() else math.nan


def _not_finite(steps: Table, columns: Sequence[str]) -> int:
    """Steps whose cell is empty, which is how JSON has to write what is not finite, or not a finite number."""
    bad = np.zeros(len(steps), bool)
    for name in columns:
        if name in steps.columns:
            bad |= ~np.isfinite(steps.numbers(name))
    return int(bad.sum())


def has_optimum(fits: Mapping[str, Any] | None) -> Finding:
    """Passes where the parabola of the largest budget, for a kind of foveated model, is lowest within its sizes."""
    if fits is None:
        return Finding(NOT_MEASURED, "no fits.json")
    entries = {kind: each["isoflop"] for kind, each in fits["kinds"].items() if kind.startswith("foveated")}
    entries = {kind: isoflop for kind, isoflop in entries.items() if isoflop}
    if not entries:
        return Finding(NOT_MEASURED, "fits.json has no budget of foveated models")
    parts, passed = [], False
    for kind, isoflop in entries.items():
        last, count = isoflop[-1], sum(entry["optimum"] is not None for entry in isoflop)
        optimum = last["optimum"]
        passed = passed or optimum is not None
        words = f"N = {Estimate(**optimum).words()}" if optimum else last["refused"]
        budgets = f"{count} of {len(isoflop)} budgets have an optimum"
        parts.append(f"{kind} at {last['budget']:.2g} FLOPs: {words} ({budgets})")
    return Finding(PASS if passed else FAIL, "; ".join(parts))


def missing_logs(folder: Path) -> list[str]:
    """Records and fields that a run has to leave behind and that its folder does not hold; empty where all is there."""
    checks = {
        "config.yaml": lambda path: [],
        "metrics.csv": lambda path: _absent(CSV_COLUMNS, read_csv(path).columns),
        "metrics.jsonl": lambda path: _absent(STEP_FIELDS, read_jsonl(path, "step").columns),
        "data.csv": lambda path: [] if len(read_csv(path)) else ["rows"],
        "run_summary.json": lambda path: _absent(SUMMARY_FIELDS, _json(path)),
        "evaluation/evaluation.json": lambda path: [] if _json(path).get("complete") else ["its end: it is incomplete"],
    }
    missing = []
    for name, check in checks.items():
        path = folder / name
        if not path.is_file():
            missing.append(name)
            continue
        try:
            missing += [f"{name}: {part}" for part in check(path)]
        except ValueError as error:  # a record that cannot be read is no record
            missing.append(f"{name}: {error}")
    if not any((folder / "checkpoints").glob("*/manifest.json")) and not _kept_by_study(folder):
        missing.append("checkpoints/*/manifest.json")
    looks = _json(folder / "evaluation" / "evaluation.json").get("architecture") != "multi_token"
    if looks and not any((folder / "evaluation" / "maps").glob("*.npz")):
        missing.append("evaluation/maps/*.npz")
    return missing


def _kept_by_study(folder: Path) -> bool:
    """Whether a study carried the run out: it removes the checkpoints of runs that it has evaluated."""
    return _json(folder / "study.json").get("status") == "done"


def _absent(wanted: Sequence[str], there: Any) -> list[str]:
    return [name for name in wanted if name not in there]


def _json(path: Path) -> dict[str, Any]:
    """An object; empty where the file is absent or none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
