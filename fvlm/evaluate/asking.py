"""Everything that is asked of a checkpoint, part by part, so that what was found before is not asked again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from fvlm.evaluate.benchmarks.base import Benchmark
from fvlm.evaluate.items import in_turn
from fvlm.evaluate.multiple_choice import ChoiceTask
from fvlm.evaluate.suite import Suite
from fvlm.evaluate.writing import Writer
from fvlm.model.configuration import MODES

SAMPLES = 6
"""Questions of each task that are kept with their answers."""
_TABLE_MODES = ("coarse_only", "coarse_fine")
Found = tuple[dict[str, Any], list[dict[str, Any]]]
"""Figures under the names that they have in a mode's record, and records of single answers."""


@dataclass(frozen=True, kw_only=True)
class Questions:
    """What is asked in one ordering of question and frames."""

    suite: Suite | None = None
    benchmarks: Sequence[Benchmark] = ()
    device: torch.device | str = "cpu"
    writer: Writer | None = None
    """Where multiple choice is answered in writing; None: by likelihood. Lists are always scored by likelihood."""

    def parts(self, model: nn.Module, mode: str, fine_iterations: int) -> dict[str, Callable[[], Found]]:
        """The parts of one mode by name, each to be run by all ranks together."""
        found: dict[str, Callable[[], Found]] = {}
        tasks = self.suite.tasks if self.suite else ()
        for name in [name for name in ("loss", "blank") if name in tasks]:
            found[name] = partial(self._losses, model, mode, fine_iterations, name)
        for task in [*(self.suite.choice if self.suite else ()), *self.benchmarks]:
            found[task.name] = partial(self._choices, model, mode, fine_iterations, task)
        if self.suite and self.suite.captions:
            found["captions"] = partial(self._captions, model, mode, fine_iterations)
        return found

    def _losses(self, model: nn.Module, mode: str, fine_iterations: int, name: str) -> Found:
        report = self.suite.losses(model, mode, fine_iterations, blank=name == "blank", intervals=True)
        figures: dict[str, Any] = {name: report.as_dict()}
        if name == "loss":
            figures["seconds_per_sample"] = self.suite.seconds_per_sample(model, mode, fine_iterations)
        return figures, []

    def _choices(self, model: nn.Module, mode: str, fine_iterations: int, task: ChoiceTask) -> Found:
        call = {"device": self.device, "mode": mode, "fine_iterations": fine_iterations}
        if self.writer and task.name != "slots":
            answers, skipped = task.run_by_writing(model, self.writer, **call)
        else:
            answers, skipped = task.run(model, **call)
        return {task.name: task.figures(answers, skipped)}, [answer.as_dict() for answer in answers]

    def _captions(self, model: nn.Module, mode: str, fine_iterations: int) -> Found:
        call = {"device": self.device, "mode": mode, "fine_iterations": fine_iterations}
        figures, records = self.suite.captions.run(model, **call)
        return {"captions": figures}, records


def evaluate_modes(
    questions: Questions,
    model: nn.Module,
    modes: Sequence[str] = MODES,
    fine_iterations: int = 1,
    record: dict[str, Any] | None = None,
    save: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Everything that is asked, in several modes; JSON-able, the same on every rank.

    Args:
        record: what was found before, and is gone on with in place; None: nothing.
        save: called after each part.

    Returns:
        The record, with "modes" (mode → part → figures), "gaps" and "samples".
    """
    record = {} if record is None else record
    by_mode = record.setdefault("modes", {})
    samples = record.setdefault("samples", [])
    record.setdefault("gaps", {})
    for mode in modes:
        for name, ask in questions.parts(model, mode, fine_iterations).items():
            if name in by_mode.get(mode, {}):
                continue
            figures, records = ask()
            by_mode.setdefault(mode, {}).update(figures)
            record["gaps"] = gaps(by_mode)
            add_samples(samples, name, mode, records)
            if save:
                save()
    return record


def gaps(by_mode: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Autoregressive minus coarse→fine: loss in nats a token, accuracies as shares; of what both modes were asked."""
    fine, stream = by_mode.get("coarse_fine", {}), by_mode.get("autoregressive", {})
    found = {}
    if "loss" in fine and "loss" in stream:
        found["loss"] = stream["loss"]["loss"] - fine["loss"]["loss"]
    for task in fine:
        accuracies = [_overall(figures.get(task)).get("accuracy") for figures in (fine, stream)]
        if None not in accuracies:
            found[task] = accuracies[1] - accuracies[0]
    return found


def add_samples(samples: list[dict[str, Any]], task: str, mode: str, records: Sequence[Mapping[str, Any]]) -> None:
    """Put a mode's answers beside the other modes': of each task a few questions, its sources in turn."""
    by_key = {record["key"]: record for record in records}
    kept = {sample["key"]: sample for sample in samples if sample["task"] == task}
    if not kept:
        chosen = in_turn(sorted(by_key), lambda key: by_key[key]["source"])[:SAMPLES]
        shown = ("key", "source", "question", "gold")
        kept = {key: {"task": task, **{name: by_key[key][name] for name in shown}, "choices": {}} for key in chosen}
        samples += kept.values()
    for key, sample in kept.items():
        if key in by_key:
            sample["choices"][mode] = by_key[key]["choice"]


def ordering_table(by_ordering: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, dict[str, float]]]:
    """The 2×2 table, mode by ordering: (part, ordering, mode → figure) of the losses, accuracies and CIDEr.

    Args:
        by_ordering: ordering → mode → part → figures.
    """
    rows = []
    names = dict.fromkeys(name for modes in by_ordering.values() for parts in modes.values() for name in parts)
    for name in names:
        for ordering, modes in by_ordering.items():
            cells = {mode: _headline(modes.get(mode, {}).get(name)) for mode in _TABLE_MODES}
            if any(cell is not None for cell in cells.values()):
                rows.append((name, ordering, {mode: cell for mode, cell in cells.items() if cell is not None}))
    return rows


def _headline(figures: Any) -> float | None:
    if not isinstance(figures, Mapping):
        return None
    return figures.get("loss", figures.get("cider", _overall(figures).get("accuracy")))


def _overall(figures: Any) -> Mapping[str, Any]:
    return figures.get("overall", {}) if isinstance(figures, Mapping) else {}
