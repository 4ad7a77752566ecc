"""Checkpoints: written aside, flushed, published by rename, `latest` last; the newest valid one is resumed.

checkpoints/latest            name of the newest           checkpoints/best    name of the best
checkpoints/step-00000500/
    manifest.json             sha256 and size of every other file; written after them
    state.json                RunState: plan state, samples seen, best metrics, configuration hash, commit ...
    config.yaml               resolved configuration
    rng-rank-00000.pt         random states of one rank
    engine/                   DeepSpeed's files
    weights/                  safetensors, as `from_pretrained` reads them
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from fvlm.config import RunConfig, save_config
from fvlm.train.engine import Engine, World

KEEP_LAST = 2
STATE, MANIFEST = "state.json", "manifest.json"


@dataclass(kw_only=True)
class RunState:
    """Where a run stands, beside weights, optimizer and random states; JSON-able."""

    run_id: str
    config_hash: str
    identity: dict[str, Any]
    """Configuration fields behind the hash, to name the difference when it does not fit."""
    commit: str
    world_size: int
    zero_stage: int
    dtype: str
    data: dict[str, Any]
    """What the plan was made of: tokenizer hash, shards, samples."""
    plan: dict[str, int]
    """Position in the plan (`fvlm.data.plan.PlanState`), step and samples seen included."""
    wall_time_sec: float = 0.0
    loss_since_evaluation: list[float] = field(default_factory=lambda: [0.0, 0.0])
    """Σ loss and number of labels of the training steps since the last evaluation."""
    last_evaluation: int = -1
    """Step of the last evaluation."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Figures of the last evaluation."""
    best: dict[str, Any] | None = None
    """{"score", "step", "metrics"} of the best evaluation."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Samples lost while reading, by reason."""

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.plan["step"]

    @property
    def samples_seen(self) -> int:
        """Samples seen."""
        return self.plan["samples_seen"]


class CheckpointStore:
    """The checkpoints of one run, in `folder` on a file system that all ranks share; all methods are collective."""

    def __init__(self, folder: Path, world: World):
        self.folder = folder
        self.world = world

    def save(self, engine: Engine, state: RunState, config: RunConfig, best: bool) -> Path:
        """Write and publish the checkpoint of `state.step`; as the best one too if `best`. Returns its folder."""
        final = self.folder / f"step-{state.step:08d}"
        temporary = self.folder / f".tmp-{final.name}"
        if self.world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        self.world.barrier()
        engine.save(temporary)
        engine.write_weights(temporary / "weights")
        torch.save(random_state(), temporary / f"rng-rank-{self.world.rank:05d}.pt")
        if self.world.is_main:
            save_config(config, temporary / "config.yaml")
            (temporary / STATE).write_text(json.dumps(asdict(state), indent=1), encoding="utf-8")
        self.world.barrier()
        self._seal(temporary)
        if self.world.is_main:
            _publish(temporary, final)
            if best:
                _write_pointer(self.folder / "best", final.name)
            _write_pointer(self.folder / "latest", final.name)
            self._prune()
        self.world.barrier()
        return final

    def find(self) -> tuple[Path | None, list[str]]:
        """(newest valid checkpoint or None, what is wrong with each newer one), the same on every rank."""
        return self.world.broadcast(self._find() if self.world.is_main else None)

    def load(self, engine: Engine, path: Path, state: RunState) -> None:
        """Restore weights, optimizer and random states."""
        if self.world.is_main and state.best is not None and state.best["step"] == state.step:
            _write_pointer(self.folder / "best", path.name)  # the process may have died right before doing this
        engine.load(path)
        set_random_state(torch.load(path / f"rng-rank-{self.world.rank:05d}.pt", weights_only=True))

    def _find(self) -> tuple[Path | None, list[str]]:
        damaged = []
        for path in reversed(published(self.folder)):
            problem = damage(path)
            if problem is None:
                return path, damaged
            damaged.append(f"{path}: {problem}")
        return None, damaged

    def _seal(self, folder: Path) -> None:
        """Flush and hash every file, the ranks in turn, and write the manifest."""
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        mine = {
            str(path.relative_to(folder)): _flush_and_hash(path) for path in files[self.world.rank :: self.world.size]
        }
        entries = {name: entry for part in self.world.gather(mine) for name, entry in part.items()}
        if self.world.is_main:
            manifest = folder / MANIFEST
            manifest.write_text(json.dumps({"version": 1, "files": entries}, indent=1), encoding="utf-8")
            _flush(manifest)
            for directory in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
                _flush(directory)

    def _prune(self) -> None:
        """Remove all but the newest two and the best, and what interrupted saves left behind."""
        kept = {path.name for path in published(self.folder)[-KEEP_LAST:]} | {read_pointer(self.folder / "best")}
        for path in published(self.folder):
            if path.name not in kept:
                path.rename(path.with_name(f".tmp-old-{path.name}"))  # half removed, it must not look published
        for leftover in self.folder.glob(".tmp-*"):
            shutil.rmtree(leftover)


def published(folder: Path) -> list[Path]:
    """Checkpoints in `folder`, oldest first, valid or not."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def read_state(path: Path) -> RunState:
    """The RunState of a checkpoint."""
    return RunState(**json.loads((path / STATE).read_text(encoding="utf-8")))


def read_pointer(path: Path) -> str | None:
    """The name that `latest` or `best` holds, or None."""
    return path.read_text(encoding="utf-8").strip() if path.is_file() else None


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None if every file is as its manifest says."""
    try:
        entries = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"no readable {MANIFEST} ({type(error).__name__})"
    for name, entry in entries.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, expected {entry['bytes']}"
        if _sha256(file) != entry["sha256"]:
            return f"{name} does not match its sha256"
    return None


def random_state() -> dict[str, Any]:
    """Random states of this process: Python, torch, and the GPU's (numpy's global one is not used anywhere)."""
    return {
        "python": random.getstate(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Undo of `random_state`."""
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])


def _publish(temporary: Path, final: Path) -> None:
    if final.exists():  # a damaged one of the same step, passed over when this run resumed
        shutil.rmtree(final.rename(final.with_name(f".tmp-old-{final.name}")))
    temporary.rename(final)
    _flush(final.parent)


def _write_pointer(path: Path, name: str) -> None:
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text(name + "\n", encoding="utf-8")
    _flush(temporary)
    os.replace(temporary, path)
    _flush(path.parent)


def _flush_and_hash(path: Path) -> dict[str, Any]:
    _flush(path)
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
