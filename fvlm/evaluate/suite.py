"""A fixed validation set and what is asked of it, prepared once and asked of any checkpoint, in training and after."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from fvlm.data.chat import Layout
from fvlm.data.loader import PackLoader
from fvlm.data.plan import Capacities, Mixture, Plan, PlanState, SampleTable
from fvlm.data.shard import load_index
from fvlm.data.shard_index import ShardIndex
from fvlm.evaluate.attention import choose_clips, clip_maps, read_clip
from fvlm.evaluate.captioning import require_caption_metrics
from fvlm.evaluate.captions import CaptionTask
from fvlm.evaluate.items import Item, Presentation, has_options, is_caption, is_listing, read_items
from fvlm.evaluate.maps import ClipMaps
from fvlm.evaluate.multiple_choice import ChoiceTask, multiple_choice, slots, summarise
from fvlm.evaluate.ranks import rank_and_world
from fvlm.evaluate.validation import LossReport, evaluate_losses, time_mode
from fvlm.evaluate.writing import Writer
from fvlm.schema import ConfigError

logger = logging.getLogger(__name__)
ORDERINGS = {"video_first": Layout.VIDEO_FIRST, "question_first": Layout.QUESTION_FIRST}
TASKS = ("loss", "blank", "mc", "slots", "captions", "maps")
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
    captions: CaptionTask | None
    clips: list[Item]
    """The fixed clips for attention maps, and behind them those that take the place of unreadable ones."""
    num_clips: int
    """How many of them are shown."""
    device: torch.device
    clips_skipped: Counter = field(default_factory=Counter)
    """Clips that the latest `maps` could not show, by reason."""

    def losses(
        self, model: nn.Module, mode: str, fine_iterations: int = 1, blank: bool = False, intervals: bool = False
    ) -> LossReport:
        """Losses over the set; `blank`: with mid-grey frames."""
        arguments = {"source_names": self.source_names, "blank": blank, "intervals": intervals}
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
    new_tokens: int = 64,
    layout: Layout = Layout.VIDEO_FIRST,
    num_workers: int = 0,
    cache_dir: Path | None = None,
) -> Suite:
    """Reads the metadata of a validation set and lays out what is asked of it.

    Args:
        tasks: a part of `TASKS`; None: all that the set has questions for.
        mixture: of training; only how samples are shown is taken from it (looks, tokens_per_frame, grid). The set
            itself is shown once, in its own composition.
        tokens: rows of a pack.
        most_samples, most_questions: limits for the losses (the first in the plan's fixed order) and for each choice
            task and the captions (spaced evenly over the shards); None: all.
        new_tokens: most tokens of a caption.
        layout: whether frames or question come first.

    Raises:
        ConfigError: an unknown task, a choice task without a single question in the set, captions without anything to
            describe or to score them with, or a set without a sample that can be shown.
    """
    chosen = list(TASKS if tasks is None else tasks)
    unknown = set(chosen) - set(TASKS)
    if unknown:
        raise ConfigError(f"tasks: {', '.join(sorted(unknown))} unknown; expected some of {', '.join(TASKS)}")
    presentation = Presentation(image_size=image_size, layout=layout, grid=mixture.grid, **mixture.visual_arguments)
    indexes = [load_index(path, tokenizer, cache_dir) for path in shards]
    plan = _plan(SampleTable.from_indexes(indexes), mixture, layout, objective, tokens, most_samples)
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
    captions = None
    if "captions" in chosen:
        found = read_items(shards, tokenizer, image_size, is_caption, most=most_questions, cache_dir=cache_dir)
        writer = Writer(tokenizer=tokenizer, presentation=presentation, new_tokens=new_tokens, token_budget=tokens)
        captions = _captions(*found, writer, by_name=tasks is not None)
    if captions is None:
        chosen = [name for name in chosen if name != "captions"]
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
        captions=captions,
        clips=_fixed_clips(shards, tokenizer, image_size, cache_dir, _RESERVE * num_clips) if "maps" in chosen else [],
        num_clips=num_clips,
        device=torch.device(device),
    )


def _captions(items: list[Item], unreadable: Counter, writer: Writer, by_name: bool) -> CaptionTask | None:
    """The clips to describe; None, with a log line, where they cannot be and were not asked for by name."""
    try:
        if not items:
            raise ConfigError(
                "tasks: captions was asked, and no sample of the set is answered by free text; leave captions out"
            )
        require_caption_metrics()
    except ConfigError as error:
        if by_name:
            raise
        logger.info("captions left out: %s", error)
        return None
    return CaptionTask(items=items, writer=writer, skipped=unreadable)


def _plan(table: SampleTable, mixture: Mixture, layout: Layout, objective: str, tokens: int, most: int | None) -> Plan:
    """One pass over the set in its own composition."""
    if objective == "dpo" and not np.any(table.rejected_answer):
        logger.info("no preference pair (chosen, rejected) in the validation set: the loss is that of its answers")
        objective = "ce_answer"
    total = len(table) if most is None else min(len(table), most)
    shown = Mixture(
        looks=mixture.looks,
        tokens_per_frame=mixture.tokens_per_frame,
        grid=mixture.grid,
        question_first=float(layout == Layout.QUESTION_FIRST),
    )
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
