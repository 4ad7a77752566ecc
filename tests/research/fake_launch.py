"""Stands in for launch/train.py and launch/evaluate.py in tests of studies: the same commands, records, exit codes.

A run's figures follow from its configuration alone. It takes one step a sample, keeps a checkpoint each, goes on from
the newest one, and on SIGTERM ends with 75. `train.seed=13` fails for as long as no file `mended` is in the working
directory. Every start leaves a line in the run's `starts`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from fvlm.config import RunConfig, config_hash, load_config, save_config

PAUSE = float(os.environ.get("FAKE_PAUSE", "0"))


def train(arguments: list[str]) -> int:
    named, overrides = dict(zip(arguments[:6:2], arguments[1:6:2], strict=True)), arguments[6:]
    config = load_config(named["--config"], [*overrides, f"out={named['--out']}"])
    folder = Path(named["--out"])
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    note_start(folder, "train")
    save_config(config, folder / "config.yaml")
    if config.init_from and not (Path(config.init_from) / "checkpoints" / "weights").is_file():
        print(f"train: init_from = {config.init_from!r}: this run has no checkpoint yet", file=sys.stderr)
        return 2
    told = []
    signal.signal(signal.SIGTERM, lambda *_: told.append(True))
    saved = folder / "checkpoints" / "weights"
    step = int(saved.read_text()) if saved.is_file() else 0
    lines = [line for line in read_lines(folder / "metrics.jsonl") if line["step"] <= step]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    while step < config.train.total_samples:
        time.sleep(PAUSE)
        step += 1
        with (folder / "metrics.jsonl").open("a") as file:
            for line in records(config, step):
                file.write(json.dumps(line) + "\n")
        saved.write_text(str(step))
        if told:
            return 75
    if config.train.seed == 13 and not Path("mended").exists():
        print("step 7 of 9\rtrain: the loss is not finite", file=sys.stderr)
        return 1
    summary = {
        "config_hash": config_hash(config),
        "commit": "0123abc",
        "steps": step,
        "samples_seen": step,
        "wall_time_sec": time.time() % 1000 + 1,
        "parameters": {"connector": 10, "dino": 20, "llm": 30},
        "environment": {"device": "pencil"},
    }
    (folder / "run_summary.json").write_text(json.dumps(summary))
    return 0


def evaluate(arguments: list[str]) -> int:
    folder = Path(arguments[1])
    note_start(folder, "evaluate")
    config = load_config(str(folder / "config.yaml"))
    if not (folder / "checkpoints" / "weights").is_file():
        print(f"evaluate: {folder} has no checkpoint", file=sys.stderr)
        return 1
    modes = ["coarse_only", "coarse_fine", "autoregressive"]
    if config.model.architecture == "multi_token":
        modes = ["coarse_fine"]
    elif "coarse_only" in arguments:
        modes = ["coarse_only"]
    found = {"complete": True, "parameters": 60, "modes": {mode: figures(config, mode) for mode in modes}}
    (folder / "evaluation").mkdir(exist_ok=True)
    (folder / "evaluation" / "evaluation.json").write_text(json.dumps(found))
    return 0


def records(config: RunConfig, step: int) -> list[dict]:
    known = {"step": step, "samples_seen": step, "flops_seen": 1e9 * step}
    accuracy = {f"slots/{config.train.mode}/{key}": value for key, value in group(config, config.train.mode).items()}
    return [
        {"kind": "step", **known, "train_loss": 1 / step},
        {"kind": "evaluation", **known, "train_loss": 1 / step, "val_loss": 1.1 / step, "loss_ratio": 0.8, **accuracy},
    ]


def figures(config: RunConfig, mode: str) -> dict:
    loss = 2 - group(config, mode)["accuracy"]
    told = {
        "loss": loss,
        "interval": [loss - 0.05, loss + 0.05],
        "loss_ratio": 0.8 if mode == "coarse_fine" else None,
        "attention_entropy": 1.5,
        "loss_by_source": {"synthetic/cue": loss},
        "interval_by_source": {"synthetic/cue": [loss - 0.1, loss + 0.1]},
        "composition": {"synthetic/cue": {"samples": 50, "labels": 200, "share": 1.0}},
    }
    choice = group(config, mode)
    return {"loss": told, "slots": {"overall": choice, "by_source": {"synthetic/cue": choice}}}


def group(config: RunConfig, mode: str) -> dict:
    looks = mode != "coarse_only" and config.model.architecture == "foveated"
    accuracy = (0.9 if looks else 0.3) - 0.001 * config.train.seed
    return {"accuracy": accuracy, "low": accuracy - 0.05, "high": accuracy + 0.05, "chance": 0.125, "n": 50}


def note_start(folder: Path, what: str) -> None:
    keys = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "RANK")
    with (folder / "starts").open("a") as file:
        file.write(json.dumps({"what": what, **{key: os.environ.get(key) for key in keys}}) + "\n")


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.is_file() else []


if __name__ == "__main__":
    sys.exit({"train": train, "evaluate": evaluate}[sys.argv[1]](sys.argv[2:]))
