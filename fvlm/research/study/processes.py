"""One run of a study as processes: `launch/train.py`, then `launch/evaluate.py`, gone on with where they stopped.

`study.json` in the run's folder says how far it is; what the processes print is in `train.log` and `evaluate.log`.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from fvlm.config import REPOSITORY, RunConfig, config_hash
from fvlm.research.records import read_json
from fvlm.research.study.plan import BASE, PlannedRun
from fvlm.train.describe import write_json
from fvlm.train.preemption import EXIT_CODE

RECORD = "study.json"
_RANK_KEYS = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"}
_MOST_LETTERS = 400


@dataclass(frozen=True, kw_only=True)
class Launcher:
    """How runs are carried out: the commands, and how many at a time."""

    train: tuple[str, ...] = (sys.executable, str(REPOSITORY / "launch" / "train.py"))
    evaluate: tuple[str, ...] = (sys.executable, str(REPOSITORY / "launch" / "evaluate.py"))
    ds_config: str = "zero2.json"
    """DeepSpeed JSON of all runs."""
    parallel: int = 1
    """Runs at a time, of one rank each: a GPU each, or an equal part of the CPU cores."""

    def environment(self, slot: int) -> dict[str, str]:
        """Of the processes of the run in a slot, 0..parallel-1."""
        found = {key: value for key, value in os.environ.items() if key not in _RANK_KEYS}
        found["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // self.parallel))
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = list(map(str, range(torch.cuda.device_count()))) if visible is None else visible.split(",")
        return found | ({"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if gpus else {})

    def train_command(self, run: PlannedRun, out: Path) -> list[str]:
        """Trains the run, or goes on with it."""
        named = ["--config", str(out / BASE), "--ds_config", self.ds_config, "--out", str(out / run.name)]
        return [*self.train, *named, f"name={json.dumps(run.name)}", *run.overrides]

    def evaluate_command(self, run: PlannedRun, config: RunConfig, out: Path) -> list[str]:
        """Evaluates its best checkpoint, or goes on with that."""
        return [*self.evaluate, "--checkpoint", str(out / run.name), *evaluate_arguments(run, config)]


def evaluate_arguments(run: PlannedRun, config: RunConfig) -> list[str]:
    """What is asked: the tasks of the evaluations during training, of all samples, and maps, in the modes there are."""
    looks = config.model.architecture == "foveated"
    tasks = list(dict.fromkeys([*config.evaluation.tasks, *(["maps"] if looks else [])]))
    asked = [] if "--tasks" in run.evaluate else ["--tasks", *tasks]
    if "--modes" not in run.evaluate and looks and config.train.mode == "coarse_only":
        asked += ["--modes", "coarse_only"]
    return [*asked, *run.evaluate]


class Children:
    """The processes at work, and the end of all of them.

    Args:
        lock: an open file, locked (`flock`), which they hold with us: what outlives us keeps the folder taken.
    """

    def __init__(self, lock: IO[str]):
        self.stopping = False
        self._lock, self._running, self._guard = lock, set(), threading.Lock()

    def call(self, command: Sequence[str], environment: dict[str, str], log: Path) -> int:
        """Runs a command to its end, what it prints appended to `log`; returns its exit code."""
        with log.open("ab") as file:
            with self._guard:
                if self.stopping:
                    return EXIT_CODE
                pipes = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT}
                process = subprocess.Popen(
                    command,
                    env=environment,
                    pass_fds=[self._lock.fileno()],
                    start_new_session=True,  # Ctrl-C comes to us alone, and `stop` lets them save
                    **pipes,
                )
                self._running.add(process)
            try:
                return process.wait()
            finally:
                with self._guard:
                    self._running.discard(process)

    def stop(self, *_: Any) -> None:
        """Tell all to save and end; told again, end them at once. A signal's handler."""
        end = subprocess.Popen.kill if self.stopping else subprocess.Popen.terminate
        self.stopping = True
        for process in tuple(self._running):
            end(process)


def carry_out(
    run: PlannedRun, config: RunConfig, out: Path, launcher: Launcher, slot: int, children: Children
) -> dict[str, Any]:
    """Train and evaluate, as far as it is not done; returns the contents of the run's `study.json`."""
    folder = out / run.name
    asked = evaluate_arguments(run, config)
    start = read_record(out / run.after) if run.after else None
    record = {"config_hash": config_hash(config), "evaluate": asked, "status": "running", "reason": None}
    record |= {"start": start and start["config_hash"]}
    known = read_record(folder)
    if is_done(folder, record):
        return known
    folder.mkdir(parents=True, exist_ok=True)
    begun = known["started"] if known and known["config_hash"] == record["config_hash"] else None
    record |= {"started": begun or _now(), "finished": None}
    write_json(folder / RECORD, record)
    commands = {"evaluate": launcher.evaluate_command(run, config, out)}
    if not _is_trained(folder, record["config_hash"]):
        (folder / "run_summary.json").unlink(missing_ok=True)  # of training that is done again from its start
        commands = {"train": launcher.train_command(run, out), **commands}
    for name, command in commands.items():
        log = folder / f"{name}.log"
        begun = log.stat().st_size if log.exists() else 0
        code = children.call(command, launcher.environment(slot), log)
        if code:
            told = children.stopping or code == EXIT_CODE
            reason = None if told else f"{name}: {last_message(log, begun, code)}"
            record |= {"status": "stopped" if told else "failed", "reason": reason}
            break
    else:
        record |= {"status": "done"}
    record["finished"] = _now()
    write_json(folder / RECORD, record)
    return record


def refuse(folder: Path, config: RunConfig, reason: str) -> dict[str, Any]:
    """The record, written too, of a run that cannot be begun."""
    known = {"config_hash": config_hash(config), "evaluate": [], "status": "failed", "reason": reason}
    known |= {"started": None, "finished": _now()}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RECORD, known)
    return known


def read_record(folder: Path, digest: str | None = None) -> dict[str, Any] | None:
    """`study.json` of a run; None where it was never begun, or was with another configuration than `digest` names."""
    path = folder / RECORD
    record = read_json(path) if path.is_file() else None
    return record if record is not None and digest in (None, record["config_hash"]) else None


def is_done(folder: Path, wanted: dict[str, Any]) -> bool:
    """Whether the very run that is `wanted` (configuration, evaluation, start) was trained and evaluated."""
    known = read_record(folder)
    if known is None or known["status"] != "done":
        return False
    known = {"start": wanted["start"], **known}  # records of before it was noted
    same = all(known[key] == wanted[key] for key in ("config_hash", "evaluate", "start"))
    return same and (folder / "evaluation" / "evaluation.json").is_file()


def _is_trained(folder: Path, digest: str) -> bool:
    """Whether the run ended, and its weights are still there to be evaluated."""
    summary = folder / "run_summary.json"
    there = summary.is_file() and (folder / "checkpoints").is_dir()
    return there and read_json(summary).get("config_hash") == digest


def last_message(log: Path, begun: int, code: int) -> str:
    """The last line that was printed from byte `begun` on; where a signal ended the process, which one."""
    with log.open("rb") as file:
        file.seek(begun)
        text = file.read().decode("utf-8", "replace")
    lines = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
    message = lines[-1] if lines else "it printed nothing"
    if code < 0:
        message = f"ended by {signal.Signals(-code).name}; the last it printed: {message}"
    return message if len(message) <= _MOST_LETTERS else message[:_MOST_LETTERS] + " …"


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S")
