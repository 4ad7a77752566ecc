"""Checkpoints: copied to the host at their step, written beside training, published by rename, `latest` last.

checkpoints/latest            name of the newest           checkpoints/best    name of the best
checkpoints/step-00000500/
    manifest.json             sha256 and size of every other file; written after them
    state.json                RunState: plan state, samples seen, best metrics, configuration hash, commit ...
    config.yaml               resolved configuration
    rng-rank-00000.pt         random states of one rank
    engine/                   master weights, moments, steps (`fvlm.train.reshape`)
    weights/                  safetensors, as `from_pretrained` reads them
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import random
import secrets
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from fvlm.config import RunConfig, save_config
from fvlm.train.background import Save, flush, sha256
from fvlm.train.engine import Engine, World
from fvlm.train.reshape import CheckpointError

KEEP_LAST = 2
STATE, MANIFEST = "state.json", "manifest.json"
VERSION = 2
"""Of the format."""

logger = logging.getLogger(__name__)


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
    device_sec: float = 0.0
    """Wall time on every rank, summed; the number of ranks may change from start to start."""
    loss_since_evaluation: list[float] = field(default_factory=lambda: [0.0, 0.0])
    """Σ loss and number of labels of the training steps since the last evaluation."""
    last_record: dict[str, Any] = field(default_factory=dict)
    """Of the newest step in `metrics.jsonl`; an evaluation repeats some of it."""
    last_evaluation: int = -1
    """Step of the last evaluation."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Figures of the last evaluation."""
    best: dict[str, Any] | None = None
    """{"score", "step", "metrics"} of the best evaluation."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Samples lost while reading, by reason."""
    samples_by_source: dict[str, int] = field(default_factory=dict)
    """Samples of the packs so far."""
    flops_seen: float = 0.0
    """Forward and backward operations so far, as the plan has them."""
    guard: dict[str, Any] = field(default_factory=dict)
    """Losses and gradient norms that the next steps are judged by, and what was left out (`fvlm.train.guard`)."""
    failed_saves: int = 0
    """Checkpoints that could not be written."""

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.plan["step"]

    @property
    def samples_seen(self) -> int:
        """Samples seen."""
        return self.plan["samples_seen"]


class CheckpointStore:
    """The checkpoints of one run, in `folder` on a file system that all ranks share; all methods are collective.

    A save is published by `settle`, between two steps: at once where every rank has `written` its files. Where one of
    them could not, nothing is published, the run goes on, and the next save is the next try. A store of those `before`
    a step looks back at a run: it finds no later ones, and leaves the pointers alone.
    """

    def __init__(self, folder: Path, world: World, before: int | None = None):
        self.folder = folder
        self.world = world
        self._before = before
        self.saved_step: int | None = None
        """Of the newest checkpoint that was published or loaded."""
        self._best: dict[str, Any] | None = None
        """`RunState.best` of the best one among those."""
        self._pending: tuple[Save, RunState] | None = None
        """Under way, and the run's state, which goes on."""
        self._problem = "it was not begun"
        """Of the last save that failed."""

    def save(self, engine: Engine, state: RunState, config: RunConfig, best: bool) -> None:
        """Copy everything to the host and begin to write it; as the best one too if `best`.

        A save before it is settled first. What goes wrong is logged and counted in `state.failed_saves`.
        """
        self.settle()
        shot = engine.snapshot()
        needed = sum(self.world.gather(shot.num_bytes))
        token = self.world.broadcast(secrets.token_hex(4))  # ranks of a run that died may still be writing
        job = Save(
            step=state.step,
            folder=self.folder / f".tmp-{_name(state.step)}-{token}",
            best=state.best if best else None,
            needed=needed,
            files=shot.files() | self._small_files(state, config),
        )
        problem = self.world.broadcast(self._make_room(job) if self.world.is_main else None)
        if problem is not None:
            self._fail(job, state, problem)
            return
        job.start()
        self._pending = job, state

    @property
    def written(self) -> bool:
        """Whether this rank has written its files of the save under way; False where there is none."""
        return self._pending is not None and self._pending[0].written

    def settle(self, required_step: int | None = None) -> None:
        """Wait for the save under way and publish it.

        Raises CheckpointError, on all ranks, if the newest checkpoint then is not that of `required_step`.
        """
        if self._pending is not None:
            (job, state), self._pending = self._pending, None
            problem = self._agree(job)
            if problem is None:
                self.saved_step, self._best = job.step, job.best or self._best
            else:
                self._fail(job, state, problem)
        if required_step is not None and self.saved_step != required_step:
            raise CheckpointError(f"step {required_step} could not be saved: {self._problem}; {self._resumes_from()}")

    def find(self) -> tuple[Path | None, list[str]]:
        """(newest valid checkpoint or None, what is wrong with each newer one), the same on every rank."""
        self.settle()
        return self.world.broadcast(self._find() if self.world.is_main else None)

    def load(self, engine: Engine, path: Path, state: RunState) -> None:
        """Restore weights, optimizer and random states, on any number of ranks and under any ZeRO stage.

        On the same number of ranks each gets its own random states back. On another they are drawn anew from the run's
        seed, the step and the rank. `state` is told who has it now, and the pointers are made to agree with it.
        """
        engine.load(path)
        ranks_before, stage_before = state.world_size, state.zero_stage
        if ranks_before == self.world.size:
            set_random_state(torch.load(path / _rng_file(self.world.rank), weights_only=True))
        else:
            reseed(state.identity["train.seed"], state.step, self.world.rank)
        if (ranks_before, stage_before) != (self.world.size, engine.stage):
            logger.info(
                "checkpoint of %s, ZeRO-%d: reshaped to %s, ZeRO-%d",
                *(_ranks(ranks_before), stage_before, _ranks(self.world.size), engine.stage),
            )
        state.world_size, state.zero_stage = self.world.size, engine.stage
        self.saved_step, self._best = state.step, state.best
        if self.world.is_main and self._before is None:
            self._point(state.best, path.name)

    def _agree(self, job: Save) -> str | None:
        """Publish what all ranks have written; returns what stands in the way, the same on all ranks."""
        entries, error = job.wait()
        results = self.world.gather((entries, error))
        if errors := [f"rank {rank}: {error}" for rank, (_, error) in enumerate(results) if error is not None]:
            return "; ".join(errors)
        entries = {name: entry for part, _ in results for name, entry in part.items()}
        return self.world.broadcast(self._publish(job, entries) if self.world.is_main else None)

    def _find(self) -> tuple[Path | None, list[str]]:
        damaged = []
        for path in reversed(published(self.folder)):
            if self._before is not None and path.name >= _name(self._before):
                continue
            problem = damage(path)
            if problem is None:
                return path, damaged
            damaged.append(f"{path}: {problem}")
        return None, damaged

    def _small_files(self, state: RunState, config: RunConfig) -> dict[str, Callable[[Path], Any]]:
        """Writers of all but the engine's files, of what is now."""
        buffer = io.BytesIO()
        torch.save(random_state(), buffer)
        files = {_rng_file(self.world.rank): lambda path: path.write_bytes(buffer.getvalue())}
        if self.world.is_main:
            text = json.dumps(asdict(state), indent=1)
            files["config.yaml"] = lambda path: save_config(config, path)
            files[STATE] = lambda path: path.write_text(text, encoding="utf-8")
        return files

    def _make_room(self, job: Save) -> str | None:
        """Remove what interrupted saves left, make the folder; returns what stands in the way."""
        try:
            for leftover in self.folder.glob(".tmp-*"):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            job.folder.mkdir(parents=True)
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            return f"{self.folder}: {error}"
        if free < job.needed:
            return f"{self.folder}: {free:,} bytes free on this disk"
        return None

    def _publish(self, job: Save, entries: dict[str, dict[str, Any]]) -> str | None:
        """Manifest, rename, pointers, pruning; returns what went wrong before the rename, which is the moment."""
        final = self.folder / _name(job.step)
        try:
            manifest = job.folder / MANIFEST
            manifest.write_text(json.dumps({"version": VERSION, "files": entries}, indent=1), encoding="utf-8")
            flush(manifest)
            for directory in [job.folder, *(path for path in job.folder.rglob("*") if path.is_dir())]:
                flush(directory)
            if final.exists():  # damaged and passed over when this run resumed, or without the last evaluation
                shutil.rmtree(final.rename(final.with_name(f".tmp-old-{final.name}")))
            job.folder.rename(final)
        except OSError as error:
            return f"{job.folder}: {error}"
        try:
            flush(self.folder)
            self._point(job.best or self._best, final.name)
            self._prune(final.name)
        except OSError as error:
            logger.warning("%s is published, but tidying up after it failed: %s", final, error)
        return None

    def _fail(self, job: Save, state: RunState, problem: str) -> None:
        """Count and say it; the best checkpoint is one that exists."""
        self._problem = problem
        state.failed_saves += 1
        if job.best is not None and state.best == job.best:
            state.best = self._best
        if self.world.is_main:
            shutil.rmtree(job.folder, ignore_errors=True)
            logger.warning(
                "step %d was not saved: %s (a checkpoint takes %s bytes). The run goes on and tries again at the next "
                "interval; %s", job.step, problem, f"{job.needed:,}", self._resumes_from()
            )  # fmt: skip

    def _resumes_from(self) -> str:
        return "no checkpoint yet" if self.saved_step is None else f"the last checkpoint is {_name(self.saved_step)}"

    def _point(self, best: dict[str, Any] | None, latest: str) -> None:
        """Make the pointers `best` and `latest` right, where they are not."""
        names = {"best": _name(best["step"]) if best is not None else None, "latest": latest}
        for pointer, name in names.items():
            if name is not None and (self.folder / name).is_dir() and read_pointer(self.folder / pointer) != name:
                _write_pointer(self.folder / pointer, name)

    def _prune(self, newest: str) -> None:
        """Remove all but the newest two and the best; also those of later steps, which the run has turned back from."""
        names = [path.name for path in published(self.folder) if path.name <= newest]
        kept = {*names[-KEEP_LAST:], read_pointer(self.folder / "best")}
        for path in published(self.folder):
            if path.name not in kept:
                # half removed, it must not look published
                shutil.rmtree(path.rename(path.with_name(f".tmp-old-{path.name}")))


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
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        version, entries = manifest["version"], manifest["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"no readable {MANIFEST} ({type(error).__name__})"
    if version != VERSION:
        return f"format {version}, this program reads {VERSION}"
    for name, entry in entries.items():
        try:
            problem = _difference(path / name, entry)
        except OSError as error:
            problem = f"cannot be read: {error}"
        if problem is not None:
            return f"{name} {problem}"
    return None


def _difference(file: Path, entry: dict[str, Any]) -> str | None:
    """How a file is not as the manifest says."""
    if not file.is_file():
        return "is missing"
    if file.stat().st_size != entry["bytes"]:
        return f"has {file.stat().st_size} bytes, expected {entry['bytes']}"
    return None if sha256(file) == entry["sha256"] else "does not match its sha256"


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


def reseed(seed: int, step: int, rank: int) -> None:
    """Random states of a rank that has none to go on from: drawn from the run's seed, the step and the rank."""
    drawn = int.from_bytes(hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()[:8], "big")
    random.seed(drawn)
    torch.manual_seed(drawn % 2**63)


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _rng_file(rank: int) -> str:
    return f"rng-rank-{rank:05d}.pt"


def _ranks(number: int) -> str:
    return f"{number} rank" if number == 1 else f"{number} ranks"


def _write_pointer(path: Path, name: str) -> None:
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text(name + "\n", encoding="utf-8")
    flush(temporary)
    os.replace(temporary, path)
    flush(path.parent)
