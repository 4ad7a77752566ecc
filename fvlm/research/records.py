"""The records of one run, as its folder holds them; what is absent is named and never filled in."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fvlm.evaluate.maps import ClipMaps, load_clip
from fvlm.research.tables import NothingRecorded, Table, read_csv, read_jsonl


@dataclass(frozen=True, kw_only=True, eq=False)
class RunRecords:
    """One run, equal to itself only; each record is None, or empty, where `missing` names it."""

    folder: Path
    config: dict[str, Any] | None
    summary: dict[str, Any] | None
    metrics: Table | None
    """metrics.csv: one row an evaluation."""
    evaluations: Table | None
    """metrics.jsonl: the same evaluations with every figure, accuracies included."""
    evaluation: dict[str, Any] | None
    """evaluation/evaluation.json: the checkpoint in three modes."""
    clips: list[ClipMaps] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return str((self.config or {}).get("name") or self.folder.name)

    def setting(self, key: str, default: Any = None) -> Any:
        """A value of the configuration by its dotted key."""
        value: Any = self.config or {}
        for part in key.split("."):
            if not isinstance(value, dict) or part not in value:
                return default
            value = value[part]
        return value

    @property
    def trained_mode(self) -> str:
        """The mode that this run trained, in which its accuracy counts."""
        return str(self.setting("train.mode", "coarse_fine"))

    @property
    def label(self) -> str:
        """What kind of run this is, for legends and tables."""
        if self.setting("model.architecture") == "multi_token":
            grid = self.setting("model.grid", "?")
            return f"{grid} pooled token{'s' if grid != 1 else ''} a frame"
        tokens = self.setting("model.tokens_per_frame", 1)
        kind = "coarse only" if self.trained_mode == "coarse_only" else "foveated"
        return f"{kind}, {tokens} token{'s' if tokens != 1 else ''} a frame"

    def mode(self, mode: str) -> dict[str, Any]:
        """The evaluation's figures of a mode; empty where it was not run."""
        return ((self.evaluation or {}).get("modes") or {}).get(mode) or {}

    def accuracy(self, task: str, mode: str) -> dict[str, Any] | None:
        """The overall figures of a task in a mode; None where it was not run."""
        return (self.mode(mode).get(task) or {}).get("overall") or None


def read_run(folder: str | Path) -> RunRecords:
    """Reads a run's folder.

    Raises FileNotFoundError where the folder does not exist or holds no record at all, and ValueError where a record
    exists and cannot be read: a broken record is not a missing one.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such run folder")
    missing: list[str] = []

    def optional(name: str, read: Callable[[Path], Any], what: str) -> Any:
        path = folder / name
        if not path.exists():
            missing.append(f"`{name}` ({what})")
            return None
        try:
            return read(path)
        except NothingRecorded:
            missing.append(f"`{name}` ({what}): begun, and empty so far")
            return None

    evaluation_dir = folder / "evaluation"
    clips = [load_clip(path) for path in sorted((evaluation_dir / "maps").glob("*.npz"))]
    records = RunRecords(
        folder=folder,
        config=optional("config.yaml", _read_yaml, "what was run"),
        summary=optional("run_summary.json", read_json, "how it ended"),
        metrics=optional("metrics.csv", _read_metrics, "losses over training"),
        evaluations=optional("metrics.jsonl", lambda path: read_jsonl(path, "evaluation"), "accuracies over training"),
        evaluation=optional("evaluation/evaluation.json", read_json, "the checkpoint in three modes"),
        clips=clips,
        missing=missing,
    )
    if len(missing) == 5 and not clips:
        raise FileNotFoundError(f"{folder}: none of a run's records is there; expected at least one of {missing}")
    if not clips:
        missing.append("`evaluation/maps/*.npz` (attention maps of fixed clips)")
    return records


def _read_metrics(path: Path) -> Table:
    return read_csv(path, ["step", "samples_seen", "train_loss", "val_loss"])


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises ValueError naming the file where it is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); write it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected keys and values, got {type(value).__name__}")
    return value
