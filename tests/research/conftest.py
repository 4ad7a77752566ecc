"""A run folder with made-up records, as a run and its evaluation leave them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import yaml

from fvlm.evaluate.maps import save_clip
from tests.research.made_up import CHANCE, CSV_COLUMNS, figures, make_clip


@pytest.fixture
def make_run(tmp_path: Path):
    """make_run(name, fine=..., coarse=..., stream=..., **config) -> folder with all records."""

    def make(name: str, fine: float = 0.95, coarse: float = 0.3, stream: float = 0.93, **train) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        rate = {"base": 1e-3, "target": None}
        config = {
            "name": name,
            "model": {"preset": "tiny", "architecture": train.pop("architecture", "foveated"), "grid": 4},
            "data": {"train": ["train"], "mixture": {"weights": None}},
            "train": {
                "mode": "coarse_fine",
                "total_samples": 3200,
                "seed": 42,
                "schedule": "cosine",
                "fine_iterations": [1, 2],
                **train,
            },
        }
        config["train"]["fine_iterations"] = [1, 2]
        config["train"]["learning_rate"] = {"connector": rate, "dino": rate, "llm": rate}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        _metrics(folder, name, config["train"]["mode"], fine)
        accuracies = {"coarse_only": coarse, "coarse_fine": fine, "autoregressive": stream}
        evaluation = {
            "checkpoint": "checkpoints/step-00000100",
            "commit": "0123abc",
            "environment": {"hardware": "2 CPU cores", "versions": {"torch": "2.13.0"}},
            "parameters": 1_500_000,
            "modes": {mode: _mode(accuracy) for mode, accuracy in accuracies.items()},
            "gaps": {"loss": 0.004, "slots": stream - fine},
            "samples": [
                {"source": "synthetic/cue", "question": "a|b?", "gold": "ring", "choices": {"coarse_fine": "ring"}}
            ],
        }
        (folder / "evaluation" / "maps").mkdir(parents=True)
        (folder / "evaluation" / "evaluation.json").write_text(json.dumps(evaluation))
        for number in range(2):
            clip = make_clip(seed=number, coarse_only=0.0625, coarse_fine=0.75)
            save_clip(clip, folder / "evaluation" / "maps" / f"clip-{number:02d}.npz")
        summary = {"wall_time_sec": 360.0, "world_size": 2, "commit": "0123abc"}
        (folder / "run_summary.json").write_text(json.dumps(summary))
        return folder

    return make


def _mode(accuracy: float) -> dict:
    loss = {
        "loss": 0.5,
        "loss_ratio": 0.8,
        "attention_entropy": 1.9,
        "composition": {
            "synthetic/cue": {"samples": 80, "labels": 400, "share": 0.8},
            "synthetic/caption": {"samples": 20, "labels": 300, "share": 0.2},
        },
        "loss_by_source": {"synthetic/cue": 0.2, "synthetic/caption": 0.9},
        "skipped": {},
    }
    blank = {"loss": 2.5, "loss_by_source": {"synthetic/cue": 2.1, "synthetic/caption": 3.0}}
    group = figures(accuracy)
    return {
        "loss": loss,
        "blank": blank,
        "seconds_per_sample": 0.004,
        "slots": {"overall": group, "by_source": {"synthetic/cue": group}},
        "multiple_choice": {"overall": group, "by_source": {"synthetic/cue_mc": group}},
    }


def _metrics(folder: Path, name: str, mode: str, final: float) -> None:
    with (folder / "metrics.csv").open("w", newline="") as file, (folder / "metrics.jsonl").open("w") as jsonl:
        writer = csv.DictWriter(file, CSV_COLUMNS, restval="")
        writer.writeheader()
        for step in range(10, 110, 10):
            row = {"run_id": name, "step": step, "samples_seen": step * 32, "wall_time_sec": step * 3.6}
            row |= {
                "train_loss": 30 / step,
                "val_loss": 33 / step,
                "loss_fine": 33 / step,
                "loss_ratio": 1 - step / 400,
            }
            row |= {"attention_entropy": 2.83 - step / 100}
            writer.writerow(row)
            accuracy = CHANCE + (final - CHANCE) * step / 100
            values = {f"slots/{mode}/{key}": value for key, value in figures(accuracy).items() if key != "flags"}
            jsonl.write(json.dumps({"kind": "step", "step": step, "train_loss": 1.0}) + "\n")
            jsonl.write(json.dumps({"kind": "evaluation", **row, **values}) + "\n")
