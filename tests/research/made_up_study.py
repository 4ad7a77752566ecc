"""A made-up ablation study and a made-up grid, as the folders of real ones are."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fvlm.evaluate.maps import save_clip
from fvlm.evaluate.statistics import wilson_interval
from fvlm.research.scaling.optimal import write_fits
from tests.research.made_up import CHANCE, make_clip

COMMIT = "0123abcdef0123abcdef"
QUESTIONS = 200
LABELS = ("question", "arm", "changed", "against")
RESULTS = (
    "run", "status", "reason", "seed", *LABELS, "architecture", "tokens_per_frame", "grid", "parameters", "samples",
    "flops_per_sample", "train_flops", "val_loss", "loss_coarse_only", "loss_coarse_fine", "loss_autoregressive",
    "loss_low", "loss_high", "loss_ratio", "task", "chance", "accuracy_coarse_only", "low_coarse_only",
    "high_coarse_only", "accuracy_coarse_fine", "low_coarse_fine", "high_coarse_fine", "accuracy_autoregressive",
    "low_autoregressive", "high_autoregressive", "trained_mode", "config_hash", "commit",
)  # fmt: skip
CURVES = (
    "run", "step", "samples_seen", "train_loss", "val_loss", "loss_ratio", "attention_entropy", "accuracy", "low",
    "high", "chance",
)  # fmt: skip
FAMILIES = ("run", "mode", "task", "source", "n", "accuracy", "low", "high", "chance", "loss")


def write_rows(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def drop_column(path: Path, column: str) -> None:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    write_rows(path, [name for name in rows[0] if name != column], rows)


def accuracies(**by_mode: float) -> dict[str, float]:
    """Columns of `results.csv`, with Wilson's intervals of QUESTIONS questions."""
    row: dict[str, float] = {"chance": CHANCE}
    for mode, accuracy in by_mode.items():
        low, high = wilson_interval(accuracy * QUESTIONS, QUESTIONS)
        row |= {f"accuracy_{mode}": accuracy, f"low_{mode}": low, f"high_{mode}": high}
    return row


def arm(name: str, question: str, changed: str, seed: int = 0, **figures: Any) -> dict[str, Any]:
    """A row of `results.csv`: one foveated token a frame, unless `figures` say otherwise."""
    fine, coarse, stream = (figures.pop(key, value) for key, value in (("fine", 0.9), ("coarse", 0.3), ("stream", 0.8)))
    row = {
        "run": f"{name}-s{seed}", "status": "done", "seed": seed, "question": question, "arm": name,
        "changed": changed, "architecture": "foveated", "tokens_per_frame": 1, "parameters": 1_500_000,
        "samples": 3200, "flops_per_sample": 2e9, "train_flops": 6.4e12, "val_loss": 0.6, "loss_coarse_fine": 0.6,
        "loss_coarse_only": 0.9, "loss_autoregressive": 0.65, "loss_low": 0.57, "loss_high": 0.63, "loss_ratio": 0.67,
        "task": "slots", "trained_mode": "coarse_fine", "commit": COMMIT,
        **accuracies(coarse_only=coarse, coarse_fine=fine, autoregressive=stream),
    }  # fmt: skip
    return row | figures


def coarse_arm(name: str = "A6") -> dict[str, Any]:
    row = arm(name, "A6", 'train.mode: "coarse_fine" → "coarse_only"', trained_mode="coarse_only")
    for key in [key for key in row if key.endswith(("coarse_fine", "autoregressive"))]:
        del row[key]
    return row | {"loss_coarse_only": 0.8, "val_loss": 0.8, **accuracies(coarse_only=0.35)}


def pooled_arm(name: str = "B1", grid: int = 16) -> dict[str, Any]:
    changed = 'model.architecture: "foveated" → "multi_token"; model.grid: 1 → 16'
    row = arm(name, "B1", changed, architecture="multi_token", tokens_per_frame="", grid=grid, flops_per_sample=3e9)
    for key in [key for key in row if key.endswith(("coarse_only", "autoregressive"))]:
        del row[key]
    return row | accuracies(coarse_fine=0.5)


def ablation_rows() -> list[dict[str, Any]]:
    freeze = 'train.freeze: [] → ["dino", "llm"]'
    failed = {"run": "LR4-s0", "status": "failed", "reason": "out of memory", "question": "LR", "arm": "LR4"}
    return [
        arm("F3", "", ""),
        arm("F3", "", "", seed=1, fine=0.94),
        arm("F1", "F1", freeze, fine=0.4, val_loss=0.9),
        arm("LR2", "LR", "train.learning_rate.connector.base: 0.0007 → 0.007", fine=0.7),
        coarse_arm(),
        pooled_arm(),
        failed | {"changed": "train.learning_rate.connector.base: 0.0007 → 7e-05"},
    ]


def curve_rows(
    run: Mapping[str, Any], losses: Sequence[float] = (3.0, 2.0, 1.2, 0.8, 0.65, 0.6)
) -> list[dict[str, Any]]:
    """Evaluations at equal distances."""
    rows = []
    for step, loss in enumerate(losses, start=1):
        accuracy = CHANCE + 0.1 * step
        low, high = wilson_interval(accuracy * 100, 100)
        row = {"run": run["run"], "step": 10 * step, "samples_seen": 500 * step, "train_loss": loss, "val_loss": loss}
        looks = {"loss_ratio": 1 - 0.05 * step, "attention_entropy": 2.8 - 0.2 * step}
        row |= looks if run["architecture"] == "foveated" and run["trained_mode"] == "coarse_fine" else {}
        rows.append(row | {"accuracy": accuracy, "low": low, "high": high, "chance": CHANCE})
    return rows


def family_rows(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Looking wins on `cue` and loses on `text`, in accuracy and in loss."""
    fine = {"cue": (0.9, 0.4), "relay": (0.6, 0.7), "text": (0.5, 1.6)}
    coarse = {"cue": (0.3, 0.9), "relay": (0.5, 0.8), "text": (0.8, 1.5)}
    modes = {"coarse_fine": fine, "autoregressive": fine, "coarse_only": coarse}
    if run["architecture"] == "multi_token":
        modes = {"coarse_fine": coarse}
    elif run["trained_mode"] == "coarse_only":
        modes = {"coarse_only": coarse}
    rows = []
    for mode, families in modes.items():
        for source, (accuracy, loss) in families.items():
            named = {"run": run["run"], "mode": mode, "source": f"synthetic/{source}", "n": 80}
            low, high = wilson_interval(accuracy * 80, 80)
            rows.append({**named, "task": "loss", "loss": loss, "low": loss - 0.05, "high": loss + 0.05})
            rows.append({**named, "task": "mc", "accuracy": accuracy, "low": low, "high": high, "chance": 0.25})
    return rows


def write_study(folder: Path, rows: Sequence[Mapping[str, Any]], maps: bool = True) -> Path:
    """`results.csv`, `curves.csv`, `families.csv`, and for each run two clips with attention maps."""
    folder.mkdir(parents=True)
    done = [row for row in rows if row["status"] == "done"]
    write_rows(folder / "results.csv", list(dict.fromkeys([*RESULTS, *(key for row in rows for key in row)])), rows)
    write_rows(folder / "curves.csv", CURVES, [point for row in done for point in curve_rows(row)])
    write_rows(folder / "families.csv", FAMILIES, [family for row in done for family in family_rows(row)])
    for row in done if maps else ():
        if row["architecture"] == "foveated":
            for seed in range(2):
                clip = make_clip(frames=3, seed=seed, coarse_only=0.1, coarse_fine=0.7)
                save_clip(clip, folder / row["run"] / "evaluation" / "maps" / f"clip-{seed:02d}.npz")
    return folder


LAW = {"E": 0.5, "A": 390.0, "alpha": 0.4, "B": 60.0, "beta": 0.45}
SIZES = {"s": 3e5, "m": 1e6, "l": 3e6, "xl": 1e7}
BUDGETS = (1e12, 4e12, 1.6e13, 6.4e13)


def grid_rows(*sizes: str) -> list[dict[str, Any]]:
    """Losses of LAW, 0.15 more if pooled; a sample costs 600 operations a parameter, 1.5 times as much if pooled."""
    rows = []
    for kind, more in (("foveated", 0.0), ("multi_token", 0.15)):
        for size, parameters in SIZES.items() if not sizes else ((size, SIZES[size]) for size in sizes):
            for budget in BUDGETS:
                cost = 600 * parameters * (1.5 if kind == "multi_token" else 1.0)
                samples = budget / cost
                loss = LAW["E"] + LAW["A"] * parameters ** -LAW["alpha"] + LAW["B"] * samples ** -LAW["beta"] + more
                pooled = kind == "multi_token"
                rows.append({
                    "run": f"{size}-{kind}-{budget:g}", "status": "done", "seed": 42, "size": size, "model": kind,
                    "budget": budget, "comparison": "isoflop", "architecture": kind,
                    "tokens_per_frame": "" if pooled else 1, "grid": 16 if pooled else "", "parameters": parameters,
                    "samples": samples, "flops_per_sample": cost, "train_flops": budget, "val_loss": loss,
                    "loss_coarse_fine": loss, "loss_low": loss - 0.004, "loss_high": loss + 0.004,
                    "trained_mode": "coarse_fine", "commit": COMMIT,
                })  # fmt: skip
    return rows


def fit(folder: Path) -> Path:
    """With `fits.json`, as the grid's own fits leave it."""
    write_fits(folder / "results.csv", folder)
    return folder
