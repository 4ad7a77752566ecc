"""What a run records; rank 0 only.

`metrics.jsonl` has a line a step, `metrics.csv` a row an evaluation, `data.csv` a row a step of what concerns the data;
wandb has what the first two have, the terminal a progress bar.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fvlm.config import RunConfig, to_dict

logger = logging.getLogger(__name__)

CSV_COLUMNS = (
    "run_id", "step", "samples_seen", "wall_time_sec", "train_loss", "val_loss", "loss_fine", "loss_coarse",
    "loss_ratio", "grad_norm", "attention_entropy", "lr_connector", "lr_dino", "lr_llm", "throughput", "gpu_mem_gb",
)  # fmt: skip
_DATA_COLUMNS = re.compile(
    r"step|samples_seen|(data_wait|read|decode)_sec|samples_per_pack|skipped_samples|(fill_|share/|mixture/).+"
)


class MetricsWriter:
    """Appends to `metrics.csv`, `metrics.jsonl` and `data.csv` in `folder`.

    Whatever the files hold beyond `resume_step`, and evaluations beyond `last_evaluation`, the last one that the run
    to be resumed knows of, are cut off first, so that a resumed curve continues without duplicates; a line that a
    killed process left unfinished goes with it, and with a warning one that a crash of the machine left damaged.
    """

    def __init__(
        self, folder: Path, run_id: str, resume_step: int, last_evaluation: int, wandb: WandbSink | None = None
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self.run_id = run_id
        self._wandb = wandb
        csv_path, jsonl_path = folder / "metrics.csv", folder / "metrics.jsonl"
        _cut(csv_path, lambda line: _csv_step(line, CSV_COLUMNS) <= last_evaluation, header=",".join(CSV_COLUMNS))
        newest = {"evaluation": last_evaluation}
        _cut(jsonl_path, lambda line: (known := json.loads(line))["step"] <= newest.get(known["kind"], resume_step))
        self._csv, self._jsonl = csv_path.open("a", encoding="utf-8"), jsonl_path.open("a", encoding="utf-8")
        self._data = _DataTable(folder / "data.csv", resume_step)

    def step(self, record: Mapping[str, Any]) -> None:
        """One line of a training step."""
        self._write_jsonl({"kind": "step", **record})
        self._data.write(record)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """One CSV row, and one JSONL line with every figure of the evaluation."""
        row = {**record, "run_id": self.run_id}
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, CSV_COLUMNS, extrasaction="ignore", restval="", lineterminator="\n")
        writer.writerow({key: "" if value is None else value for key, value in row.items()})
        self._csv.write(buffer.getvalue())
        self._csv.flush()
        self._write_jsonl({"kind": "evaluation", **row})

    def guard(self, record: Mapping[str, Any]) -> None:
        """One JSONL line of a step that did not count, and why."""
        self._jsonl.write(json.dumps({"kind": "guard", **record}) + "\n")
        self._jsonl.flush()

    def close(self) -> None:
        """Close the files and wandb."""
        self._csv.close()
        self._jsonl.close()
        self._data.close()
        if self._wandb is not None:
            self._wandb.close()

    def _write_jsonl(self, record: dict[str, Any]) -> None:
        self._jsonl.write(json.dumps(record) + "\n")
        self._jsonl.flush()
        if self._wandb is not None:
            self._wandb.log(record)


class _DataTable:
    """`data.csv`: its columns are those of the first record, for sources differ from run to run but not within one.

    Reasons of lost samples come up as they please, and share one column: `bad_jpeg=2 changed_bytes=1`.
    """

    def __init__(self, path: Path, resume_step: int):
        lines = _whole_lines(path)
        header = next(csv.reader(lines[:1]), [])
        kept = _kept(path, lines, lambda line: _csv_step(line, header) <= resume_step, first=1)
        self._columns = header if kept else None
        temporary = path.with_name(path.name + ".tmp")
        self._file = temporary.open("w", newline="", encoding="utf-8")
        self._rows = csv.writer(self._file, lineterminator="\n")
        self._file.write(_joined([lines[0], *kept] if kept else []))
        self._file.flush()
        os.replace(temporary, path)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append the record's row."""
        if self._columns is None:
            self._columns = [*filter(_DATA_COLUMNS.fullmatch, record), "skipped"]
            self._rows.writerow(self._columns)
        reasons = {key.partition("/")[2]: value for key, value in record.items() if key.startswith("skipped/")}
        skipped = " ".join(f"{reason}={count}" for reason, count in reasons.items())
        self._rows.writerow([record.get(column) for column in self._columns[:-1]] + [skipped])
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _csv_step(line: str, columns: Sequence[str]) -> int:
    row = next(csv.reader([line]))
    if len(row) != len(columns):
        raise ValueError(f"{len(row)} columns, expected {len(columns)}")
    return int(row[columns.index("step")])


def _cut(path: Path, keep: Callable[[str], bool], header: str | None = None) -> None:
    """Rewrite `path` with the lines that `keep` accepts; the rewritten file replaces the old one in one move."""
    kept = _kept(path, _whole_lines(path), keep, first=1 if header else 0)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(_joined([header, *kept] if header else kept), encoding="utf-8")
    os.replace(temporary, path)


def _whole_lines(path: Path) -> list[str]:
    """Without what follows the last newline, which was being written when the process died."""
    return path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] if path.exists() else []


def _kept(path: Path, lines: list[str], keep: Callable[[str], bool], first: int) -> list[str]:
    """The lines from `first` on that `keep` accepts, without empty ones; what it cannot read is dropped and named."""
    kept, damaged = [], []
    for number, line in enumerate(lines[first:], first + 1):
        try:
            if line and keep(line):
                kept.append(line)
        except (ValueError, LookupError, TypeError, csv.Error) as error:
            damaged.append(f"line {number} ({error})")
    if damaged:
        logger.warning("%s: dropped %d damaged lines, the first is %s", path, len(damaged), damaged[0])
    return kept


def _joined(lines: list[str]) -> str:
    return "".join(line + "\n" for line in lines)


@contextmanager
def open_writer(
    config: RunConfig, run_id: str, resume_step: int, last_evaluation: int, writes: bool
) -> Iterator[MetricsWriter | None]:
    """The run's records, on the rank that `writes`; None on the others."""
    if not writes:
        yield None
        return
    wandb = WandbSink(config, run_id) if config.wandb.mode != "disabled" else None
    writer = MetricsWriter(config.folder, run_id, resume_step, last_evaluation, wandb)
    try:
        yield writer
    finally:
        writer.close()


class WandbSink:
    """Sends every number of a record to wandb, under `train/` or `val/`; never asks for a login.

    The project is `foveated-vlm-{phase}`. `online` without a login or a network becomes `offline` and says so.
    """

    def __init__(self, config: RunConfig, run_id: str):
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        mode = config.wandb.mode
        if mode == "online" and not (os.environ.get("WANDB_API_KEY") or wandb.api.api_key):
            logger.warning("wandb.mode = online, but nobody is logged in (no WANDB_API_KEY): recording offline")
            mode = "offline"
        arguments = {
            "project": f"foveated-vlm-{config.phase}",
            "name": config.name,
            "id": run_id,
            "resume": "allow",
            "dir": str(config.folder),
            "config": to_dict(config),
            "settings": wandb.Settings(init_timeout=60, console="off"),
        }
        try:
            self._run = wandb.init(mode=mode, **arguments)
        except wandb.errors.CommError as error:
            logger.warning("wandb cannot be reached (%s): recording offline", error)
            self._run = wandb.init(mode="offline", **arguments)

    def log(self, record: Mapping[str, Any]) -> None:
        """Send the numbers of one record."""
        prefix = "val" if record["kind"] == "evaluation" else "train"
        numbers = {key: value for key, value in record.items() if isinstance(value, (int, float))}
        self._run.log({f"{prefix}/{key}": value for key, value in numbers.items()}, step=record["step"])

    def close(self) -> None:
        """Finish the run's files."""
        self._run.finish()


class Progress:
    """Progress bar over samples, for rank 0; elsewhere it shows nothing."""

    def __init__(self, total: int, done: int, shown: bool):
        interval = 0.5 if sys.stderr.isatty() else 15
        self._bar = tqdm(
            total=total, initial=done, unit="sample", disable=not shown, mininterval=interval, dynamic_ncols=True
        )

    def update(self, samples: int, **figures: Any) -> None:
        """Advance to `samples` seen and show the figures that exist."""
        shown = {key: f"{value:.4g}" for key, value in figures.items() if value is not None}
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(samples - self._bar.n)

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()
