"""The tables of a study, from what its run folders hold: results.csv, families.csv, curves.csv, timing.csv.

Rows are in the plan's order; a cell is empty where there is no such figure. Only `timing.csv` depends on the clock:
the others are the same bytes however often a study was stopped.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fvlm.config import RunConfig, config_hash, load_config, to_dict
from fvlm.model.configuration import MODES
from fvlm.research.records import RunRecords, read_json
from fvlm.research.study.elsewhere import read_elsewhere
from fvlm.research.study.plan import BASE, PlannedRun, run_config
from fvlm.research.study.processes import read_record
from fvlm.research.study.workload import parameters

TASKS = {"slots": "slots", "multiple_choice": "mc"}
"""Name of a task in a record → in the tables; the first that was asked is a run's accuracy."""
RESULTS_BEFORE = ("run", "status", "reason", "seed")
RESULTS_AFTER = (
    "architecture", "tokens_per_frame", "grid", "parameters", "parameters_llm", "samples", "steps", "flops_per_sample",
    "train_flops", "train_loss", "val_loss", *(f"loss_{mode}" for mode in MODES), "loss_low", "loss_high", "loss_ratio",
    "attention_entropy", "task", "chance",
    *(f"{name}_{mode}" for mode in MODES for name in ("accuracy", "low", "high")),
    "trained_mode", "config_hash", "commit",
)  # fmt: skip
"""The labels of the runs are between the two; one that is named like a column here has no column of its own."""
FAMILIES = ("run", "mode", "task", "source", "n", "accuracy", "low", "high", "chance", "loss")
CURVES = (
    "run", "step", "samples_seen", "flops_seen", "train_loss", "val_loss", "loss_ratio", "attention_entropy",
    "accuracy", "low", "high", "chance",
)  # fmt: skip
TIMING = ("run", "wall_time_sec", "samples_per_sec", "device", "started", "finished")


@dataclass(frozen=True, kw_only=True)
class _Found:
    """What a run's folder holds so far."""

    status: str
    record: dict[str, Any]
    """study.json; empty of a run that was not begun."""
    steps: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    done: RunRecords | None = None
    """Of a finished run alone."""


def collect(runs: Sequence[PlannedRun], out: str | Path) -> None:
    """(Re)writes the tables in `out`, which holds `base.yaml`; a run without a record there may have rows elsewhere.

    Raises ValueError for a record or table that cannot be read, ConfigError where two of the latter hold the same run.
    """
    out = Path(out)
    base, elsewhere = load_config(str(out / BASE)), read_elsewhere(out)
    labels = list(dict.fromkeys(name for run in runs for name in run.labels))
    columns = [*RESULTS_BEFORE, *(name for name in labels if name not in RESULTS_BEFORE + RESULTS_AFTER)]
    columns += RESULTS_AFTER
    results, families, curves, timing = [], [], [], []
    for run in runs:
        config = run_config(run, base, out)
        found, name = _find(out / run.name, config), {"run": run.name}
        rows = elsewhere.get((run.name, config_hash(config)))
        if found.status == "not_run" and rows is not None:
            results += [{**row, **run.labels} for row in rows["results.csv"]]
            families += rows["families.csv"]
            curves += rows["curves.csv"]
            timing += rows["timing.csv"]
            continue
        ended = {"status": found.status, "reason": found.record.get("reason")}
        results.append({**run.labels, **name, **ended, **_said(config), **_figures(found, config)})
        families += [{**name, **row} for row in (_families(found.done) if found.done else ())]
        curves += [{**name, **row} for row in _curve(found.evaluations, config.train.mode)]
        timing.append({**name, **_timing(found)})
    for file, header, rows in (
        ("results.csv", columns, results),
        ("families.csv", FAMILIES, families),
        ("curves.csv", CURVES, curves),
        ("timing.csv", TIMING, timing),
    ):
        write_csv(out / file, header, rows)


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Written by rename; None and what is not finite are empty cells, other columns of a row are left out."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([_cell(row.get(column)) for column in columns] for row in rows)
    os.replace(temporary, path)


def _cell(value: Any) -> Any:
    return "" if value is None or (isinstance(value, float) and not math.isfinite(value)) else value


def _find(folder: Path, config: RunConfig) -> _Found:
    """A record of another configuration is another run's, and no record of this one."""
    record = read_record(folder, config_hash(config))
    if record is None:
        return _Found(status="not_run", record={})
    status = "stopped" if record["status"] == "running" else record["status"]
    lines = _whole_lines(folder / "metrics.jsonl")
    kinds = {kind: [line for line in lines if line["kind"] == kind] for kind in ("step", "evaluation")}
    done = None
    if status == "done":
        files = {"summary": "run_summary.json", "evaluation": "evaluation/evaluation.json"}
        contents = {name: read_json(folder / file) for name, file in files.items()}
        done = RunRecords(folder=folder, config=to_dict(config), metrics=None, evaluations=None, **contents)
    return _Found(status=status, record=record, steps=kinds["step"], evaluations=kinds["evaluation"], done=done)


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """Of a JSONL file; what follows the last newline is being written, or its process died writing it."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def _said(config: RunConfig) -> dict[str, Any]:
    """What the configuration says."""
    pooled = config.model.architecture == "multi_token"
    return {
        "seed": config.train.seed,
        "architecture": config.model.architecture,
        "tokens_per_frame": None if pooled else config.model.tokens_per_frame,
        "grid": config.model.grid if pooled else None,
        "trained_mode": config.train.mode,
        "config_hash": config_hash(config),
    }


def _figures(found: _Found, config: RunConfig) -> dict[str, Any]:
    """What a finished run came to."""
    records = found.done
    if records is None:
        return {}
    summary, mode = records.summary, records.trained_mode
    loss = records.mode(mode).get("loss") or {}
    low, high = loss.get("interval") or (None, None)
    flops, samples = found.steps[-1].get("flops_seen") if found.steps else None, summary["samples_seen"]
    task = next((task for task in TASKS if records.accuracy(task, mode)), None)
    accuracies = {each: records.accuracy(task, each) or {} for each in MODES} if task else {}
    figures = {
        "parameters": records.evaluation["parameters"],
        "parameters_llm": parameters(config.model, config.tokenizer).llm,
        "samples": samples,
        "steps": summary["steps"],
        "flops_per_sample": flops / samples if flops else None,
        "train_flops": flops,
        "train_loss": found.evaluations[-1].get("train_loss") if found.evaluations else None,
        "val_loss": loss.get("loss"),
        **{f"loss_{each}": (records.mode(each).get("loss") or {}).get("loss") for each in MODES},
        "loss_low": low,
        "loss_high": high,
        "loss_ratio": loss.get("loss_ratio"),
        "attention_entropy": loss.get("attention_entropy"),
        "task": TASKS.get(task),
        "chance": accuracies.get(mode, {}).get("chance"),
        "commit": summary["commit"],
    }
    for each, known in accuracies.items():
        figures |= {f"{name}_{each}": known.get(name) for name in ("accuracy", "low", "high")}
    return figures


def _families(records: RunRecords) -> Iterable[dict[str, Any]]:
    """A row for each mode, task and source."""
    for mode in MODES:
        parts = records.mode(mode)
        loss = parts.get("loss") or {}
        for source, value in (loss.get("loss_by_source") or {}).items():
            low, high = loss["interval_by_source"].get(source) or (None, None)
            n = loss["composition"][source]["samples"]
            yield {"mode": mode, "task": "loss", "source": source, "n": n, "loss": value, "low": low, "high": high}
        for task, name in TASKS.items():
            for source, figures in ((parts.get(task) or {}).get("by_source") or {}).items():
                shown = {key: figures.get(key) for key in ("n", "accuracy", "low", "high", "chance")}
                yield {"mode": mode, "task": name, "source": source, **shown}


def _curve(evaluations: Sequence[Mapping[str, Any]], mode: str) -> Iterable[dict[str, Any]]:
    """A row for each evaluation during training; accuracy in the trained mode."""
    for figures in evaluations:
        task = next((task for task in TASKS if f"{task}/{mode}/accuracy" in figures), None)
        accuracy = {name: figures.get(f"{task}/{mode}/{name}") for name in ("accuracy", "low", "high", "chance")}
        yield {**figures, **accuracy}


def _timing(found: _Found) -> dict[str, Any]:
    """When, for how long, on what."""
    known = {key: value for key, value in found.record.items() if key in TIMING}
    if found.done is None:
        return known
    summary = found.done.summary
    seconds, device = summary["wall_time_sec"], summary["environment"]["device"]
    return {**known, "wall_time_sec": seconds, "samples_per_sec": summary["samples_seen"] / seconds, "device": device}
