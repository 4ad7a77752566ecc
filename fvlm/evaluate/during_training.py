"""The evaluation that the training loop calls: built before the first step, so that what it cannot do is said then."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from torch import nn

from fvlm.config import RunConfig
from fvlm.data.chat import Layout
from fvlm.data.shard import find_shards
from fvlm.evaluate.attention import save_maps
from fvlm.evaluate.preference import preference_figures
from fvlm.evaluate.suite import SUMMARY_FIGURES, Suite, build_suite, training_figures
from fvlm.schema import ConfigError
from fvlm.train.build import TrainingData, mixture
from fvlm.train.engine import World
from fvlm.train.figures import expected_figures, require_figures


def validation_suite(config: RunConfig, data: TrainingData, world: World) -> Suite | None:
    """The run's validation set, ready to be asked; None without validation shards.

    Raises ConfigError for shards that cannot be read or asked, and for a `best_metric` that will not be measured.
    """
    if not config.data.val:
        return None
    chosen, shown = config.evaluation, mixture(config)
    try:
        suite = build_suite(
            find_shards(list(config.data.val)),
            data.tokenizer,
            shown,
            image_size=config.model.frame_size,
            device=world.device,
            tasks=chosen.tasks,
            objective=config.train.objective,
            tokens=chosen.tokens,
            most_samples=chosen.samples,
            most_questions=chosen.questions,
            layout=Layout.QUESTION_FIRST if shown.question_first == 1 else Layout.VIDEO_FIRST,  # as it is trained
            cache_dir=Path(config.data.cache_dir) if config.data.cache_dir else None,
        )
    except (ValueError, OSError) as error:
        raise ConfigError(f"data.val = {list(config.data.val)}: {error}") from error
    if suite.plan.objective != config.train.objective:
        count = len(suite.plan.table)
        raise ConfigError(
            f"data.val = {list(config.data.val)}: no preference pair (chosen, rejected) among its {count} samples"
        )
    mode = config.train.mode
    asked = [f"{task.name}/{mode}/{name}" for task in suite.choice if task.questions for name in SUMMARY_FIGURES]
    require_figures(config.best_metric, expected_figures(config, suite.source_names, asked))
    return suite


def validation_pairs(suite: Suite) -> TrainingData:
    """The set as the reference is asked about it (`fvlm.train.reference`)."""
    known = {name: getattr(suite, name) for name in ("tokenizer", "shards", "indexes", "plan")}
    return TrainingData(**known, table=suite.plan.table, cache=None)


def validation(
    config: RunConfig, suite: Suite, world: World, reference: np.ndarray | None = None
) -> Callable[[nn.Module, int, Callable[[], None]], dict]:
    """What the loop calls with the model, the step, and a function.

    That is called before each pack that goes through the model, and may end the evaluation by what it raises; all ranks
    have equally many packs.

    `reference` float32 [n, 2]: of the set's pairs, for the objective `dpo`.
    """
    mode, iterations = config.train.mode, config.train.fine_iterations[0]

    def evaluate(model: nn.Module, step: int, before_pack: Callable[[], None]) -> dict[str, float]:
        hook = model.register_forward_pre_hook(lambda *_: before_pack(), prepend=True)  # before ZeRO-3's own
        try:
            return ask(model, step)
        finally:
            hook.remove()

    def ask(model: nn.Module, step: int) -> dict[str, float]:
        if "maps" in config.evaluation.tasks:
            maps = suite.maps(model, [mode], iterations)
            if world.is_main:
                save_maps(maps, config.folder / "attention" / f"step-{step:08d}")
        figures = training_figures(suite, model, mode, iterations)
        if reference is not None:
            pairs = suite.batches(reference)
            figures |= preference_figures(model, pairs, config.train.dpo_beta, mode, iterations)
        return figures

    return evaluate
