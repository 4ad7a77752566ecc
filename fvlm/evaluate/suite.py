"""A fixed validation set and what is asked of it, prepared once and asked of any checkpoint, in training and after."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from fvlm.data.loader import PackLoader
from fvlm.data.plan import Capacities, Mixture, Plan, PlanState, SampleTable
from fvlm.data.shard import load_index
from fvlm.data.shard_index import ShardIndex
from fvlm.evaluate.attention import choose_clips, clip_maps, read_clip
from fvlm.evaluate.items import Item, Presentation, has_options, in_turn, is_listing, read_items
from fvlm.evaluate.maps import ClipMaps
from fvlm.evaluate.multiple_choice import Answer, ChoiceTask, multiple_choice, slots, summarise
from fvlm.evaluate.ranks import rank_and_world
from fvlm.evaluate.validation import LossReport, evaluate_losses, time_mode
from fvlm.schema import ConfigError

MODES = ("coarse_only", "coarse_fine", "autoregressive")
TASKS = ("loss", "blank", "mc", "slots", "maps")
SUMMARY_FIGURES = ("accuracy", "n", "chance", "low", "high")
_RESERVE = 4  # clips kept for each one shown, to stand in for unreadable ones


@dataclass(frozen=True, kw_only=True)
class Suite:
    """What is asked; `tasks` names a part of `TASKS`, and the others cost nothing."""

    tasks: tuple[str, ...]
    presentation: Presentation
    tokenizer: PreTrainedTokenizerBase
    shards: list[Path]
    indexes: list[ShardIndex]
    """Of `shards`."""
    plan: Plan
    """How the set is packed for the losses."""
    source_names: Sequence[str]
    batches: Callable[..., Iterable]
    """A fresh pass over this rank's share of the whole set; `reference`: of its pairs (`fvlm.train.reference`)."""
    refused: Callable[[], Counter]
    """Samples that the packs have no room for, by reason; known once a pass is through."""
    choice: list[ChoiceTask]
    clips: list[Item]
    """The fixed clips for attention maps, and behind them those that take the place of unreadable ones."""
    num_clips: int
    """How many of them are shown."""
    device: torch.device
    clips_skipped: Counter = field(default_factory=Counter)
    """Clips that the latest `maps` could not show, by reason."""

    def losses(self, model: nn.Module, mode: str, fine_iterations: int = 1, blank: bool = False) -> LossReport:
        """Losses over the set; `blank`: with mid-grey frames."""
        arguments = {"source_names": self.source_names, "blank": blank}
        report = evaluate_losses(model, self.batches(), mode, fine_iterations, **arguments)
        return replace(report, skipped=dict(Counter(report.skipped) + self.refused()))

    def seconds_per_sample(self, model: nn.Module, mode: str, fine_iterations: int = 1) -> float:
        """Device-seconds of the mode's own forward pass, over the first packs of the set."""
        return time_mode(model, self.batches(), mode, fine_iterations)[0]

    def maps(self, model: nn.Module, modes: Sequence[str], fine_iterations: int = 1) -> list[ClipMaps]:
        """Attention maps of the fixed clips; none of a model without queries, such as the multi-token baseline.

        An unreadable clip is logged, counted in `clips_skipped` and replaced by the next one, the same on every rank.
        """
        self.clips_skipped.clear()
        found: list[ClipMaps] = []
        if not hasattr(model, "attention_maps"):
            return found
        shared = (self.tokenizer, self.presentation, self.device, modes, fine_iterations)
        for item in self.clips:
            if len(found) == self.num_clips:
                break
            ready = read_clip(item, self.tokenizer, self.presentation)
            if isinstance(ready, Item):
                found.append(clip_maps(model, ready, *shared))
            else:
                self.clips_skipped[ready] += 1
        return found


def build_suite(
    shards: Sequence[Path],
    tokenizer: PreTrainedTokenizerBase,
    mixture: Mixture,
    *,
    image_size: int,
    device: torch.device | str,
    tasks: Sequence[str] | None = None,
    objective: str = "ce_all",
    tokens: int = 8192,
    most_samples: int | None = None,
    most_questions: int | None = None,
    num_clips: int = 10,
    num_workers: int = 0,
    cache_dir: Path | None = None,
) -> Suite:
    """Reads the metadata of a validation set and lays out what is asked of it.

    Args:
        tasks: a part of `TASKS`; None: all that the set has questions for.
        mixture: of training; only how samples are shown is taken from it (looks, tokens_per_frame, grid). The set
            itself is shown once, in its own composition, video first.
        tokens: rows of a pack.
        most_samples, most_questions: limits for the losses (the first in the plan's fixed order) and for each choice
            task (spaced evenly over the shards); None: all.

    Raises:
        ConfigError: an unknown task, a choice task without a single question in the set, or a set without a sample that
            can be shown.
    """
    chosen = list(TASKS if tasks is None else tasks)
    unknown = set(chosen) - set(TASKS)
    if unknown:
        raise ConfigError(f"tasks: {', '.join(sorted(unknown))} unknown; expected some of {', '.join(TASKS)}")
    presentation = Presentation(image_size=image_size, grid=mixture.grid, **mixture.visual_arguments)
    indexes = [load_index(path, tokenizer, cache_dir) for path in shards]
    plan = _plan(SampleTable.from_indexes(indexes), mixture, objective, tokens, most_samples)
    rank, world = rank_and_world()

    def batches(reference: np.ndarray | None = None) -> Iterable:
        return PackLoader(
            plan,
            list(shards),
            indexes,
            tokenizer,
            image_size,
            rank=rank,
            world_size=world,
            packs_per_step=world,
            num_workers=num_workers,
            start=PlanState(),
            device=device,
            reference=reference,
        )

    questions = {"mc": has_options, "slots": is_listing}
    asked = {"mc": multiple_choice, "slots": slots}
    choice = []
    for task in [name for name in questions if name in chosen]:
        found = read_items(shards, tokenizer, image_size, questions[task], most=most_questions, cache_dir=cache_dir)
        items, unreadable = found
        if not items and tasks is None:
            chosen.remove(task)
            continue
        if not items:
            kind = "with options" if task == "mc" else "answered by a list of words, one a frame"
            raise ConfigError(f"tasks: {task} was asked, and no sample of the set is {kind}; leave {task} out")
        prepared = asked[task](items, tokenizer, presentation)
        choice.append(replace(prepared, skipped=prepared.skipped + unreadable))
    return Suite(
        tasks=tuple(chosen),
        presentation=presentation,
        tokenizer=tokenizer,
        shards=list(shards),
        indexes=indexes,
        plan=plan,
        source_names=plan.table.source_names,
        batches=batches,
        refused=lambda: plan.refused,
        choice=choice,
        clips=_fixed_clips(shards, tokenizer, image_size, cache_dir, _RESERVE * num_clips) if "maps" in chosen else [],
        num_clips=num_clips,
        device=torch.device(device),
    )


def _plan(table: SampleTable, mixture: Mixture, objective: str, tokens: int, most: int | None) -> Plan:
    """One pass over the set in its own composition, video first."""
    if objective == "dpo" and not np.any(table.rejected_answer):
        raise ConfigError(f"validation set of {len(table)} samples: no preference pair (chosen, rejected) among them")
    total = len(table) if most is None else min(len(table), most)
    shown = Mixture(looks=mixture.looks, tokens_per_frame=mixture.tokens_per_frame, grid=mixture.grid)
    try:
        capacities = Capacities.propose(table, shown, tokens=tokens, objective=objective)
        return Plan(table, shown, capacities, objective, seed=0, total_samples=total)
    except ValueError as error:
        raise ConfigError(f"validation set of {len(table)} samples: {error}") from error


def _fixed_clips(
    shards: Sequence[Path], tokenizer: PreTrainedTokenizerBase, image_size: int, cache_dir: Path | None, most: int
) -> list[Item]:
    items, _ = read_items(shards, tokenizer, image_size, lambda meta: meta.get("kind") != "text", cache_dir=cache_dir)
    return choose_clips(items, most)


def training_figures(suite: Suite, model: nn.Module, mode: str, fine_iterations: int = 1) -> dict[str, float]:
    """What an evaluation during training records: losses under the names of metrics.csv, and accuracies.

    Accuracies are named task/mode/figure, such as `slots/coarse_fine/accuracy`, beside n, chance, low and high;
    `maps/skipped` counts the clips that the latest attention maps had to leave out.
    """
    figures = suite.losses(model, mode, fine_iterations).metrics()
    for task in suite.choice:
        answers, _ = task.run(model, device=suite.device, mode=mode, fine_iterations=fine_iterations)
        overall = summarise(answers)["overall"]
        figures |= {f"{task.name}/{mode}/{name}": overall[name] for name in SUMMARY_FIGURES if name in overall}
    if "maps" in suite.tasks:
        figures["maps/skipped"] = suite.clips_skipped.total()
    return figures


def evaluate_modes(
    suite: Suite, model: nn.Module, modes: Sequence[str] = MODES, fine_iterations: int = 1
) -> dict[str, Any]:
    """Everything the suite asks, in several modes: {"modes", "gaps", "samples"}, JSON-able, the same on every rank."""
    by_mode: dict[str, dict[str, Any]] = {}
    chosen: dict[str, dict[str, list[Answer]]] = {}
    for mode in modes:
        figures: dict[str, Any] = {}
        if "loss" in suite.tasks:
            figures["loss"] = suite.losses(model, mode, fine_iterations).as_dict()
            figures["seconds_per_sample"] = suite.seconds_per_sample(model, mode, fine_iterations)
        if "blank" in suite.tasks:
            figures["blank"] = suite.losses(model, mode, fine_iterations, blank=True).as_dict()
        for task in suite.choice:
            answers, skipped = task.run(model, device=suite.device, mode=mode, fine_iterations=fine_iterations)
            figures[task.name] = {**summarise(answers), "skipped": dict(skipped)}
            chosen.setdefault(task.name, {})[mode] = answers
        by_mode[mode] = figures
    return {"modes": by_mode, "gaps": gaps(by_mode), "samples": sample_outputs(chosen)}


def gaps(by_mode: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Autoregressive minus coarse→fine: loss in nats a token, accuracies as shares; empty unless both modes ran."""
    fine, stream = by_mode.get("coarse_fine"), by_mode.get("autoregressive")
    if not fine or not stream:
        return {}
    found = {}
    if "loss" in fine:
        found["loss"] = stream["loss"]["loss"] - fine["loss"]["loss"]
    for task in ("slots", "multiple_choice"):
        if fine.get(task, {}).get("overall"):
            found[task] = stream[task]["overall"]["accuracy"] - fine[task]["overall"]["accuracy"]
    return found


def sample_outputs(chosen: dict[str, dict[str, list[Answer]]], most: int = 6) -> list[dict[str, Any]]:
    """A few questions of each task, its sources in turn, with the right answer and each mode's choice."""
    outputs = []
    for by_mode in chosen.values():
        by_key = {mode: {answer.question.request.key: answer.as_dict() for answer in a} for mode, a in by_mode.items()}
        first = next(iter(by_key.values()))
        asked = sorted(set.intersection(*(set(answers) for answers in by_key.values())))
        for key in in_turn(asked, lambda key, first=first: first[key]["source"])[:most]:
            record = {name: first[key][name] for name in ("key", "source", "question", "gold")}
            outputs.append({**record, "choices": {mode: answers[key]["choice"] for mode, answers in by_key.items()}})
    return outputs
