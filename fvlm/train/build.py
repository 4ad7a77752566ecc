"""What a configuration stands for: the data with its plan, and the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedTokenizerBase

from fvlm.config import ModelConfig, RunConfig
from fvlm.data.chat import load_tokenizer, tokenizer_hash
from fvlm.data.loader import PackLoader
from fvlm.data.plan import Capacities, Mixture, Plan, PlanState, SampleTable
from fvlm.data.shard import ShardIndex, find_shards, load_index
from fvlm.model import FoveatedConfig, FoveatedVLM, MultiTokenVLM, build_model, convert, model_class, tiny_config
from fvlm.schema import ConfigError
from fvlm.train.checkpoint import read_pointer
from fvlm.train.engine import World
from fvlm.train.optimizer import freeze

HUB = "hf:"


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Shards, and the plan over them."""

    tokenizer: PreTrainedTokenizerBase
    shards: list[Path]
    indexes: list[ShardIndex]
    table: SampleTable
    plan: Plan

    def identity(self) -> dict[str, Any]:
        """What a resumed run has to find unchanged."""
        return {
            "plan": self.plan.fingerprint(),
            "tokenizer": tokenizer_hash(self.tokenizer),
            "shards": len(self.shards),
            "samples": len(self.table),
        }


def mixture(config: RunConfig) -> Mixture:
    """The configured mixture, with what the model needs of each frame."""
    model, chosen = config.model, config.data.mixture
    grid = model.grid if model.architecture == "multi_token" else 0
    return Mixture(
        weights=chosen.weights,
        text_share=chosen.text_share,
        question_first=chosen.question_first,
        narrated=chosen.narrated,
        looks=chosen.looks,
        tokens_per_frame=1 if grid else model.tokens_per_frame,
        grid=grid,
    )


def load_data(config: RunConfig) -> TrainingData:
    """Tokenizer, indexes and plan of the training samples.

    Raises ConfigError for shards that are not there, an empty data set, or a mixture or capacities that do not fit it.
    """
    data, train = config.data, config.train
    cache_dir = Path(data.cache_dir) if data.cache_dir else None
    try:
        tokenizer = load_tokenizer(config.tokenizer)
        shards = find_shards(list(data.train))
        indexes = [load_index(path, tokenizer, cache_dir) for path in shards]
        table = SampleTable.from_indexes(indexes)
        if not len(table):
            raise ValueError(f"{len(shards)} shards without a single sample")
        mixed = mixture(config)
        capacities = Capacities.propose(
            table,
            mixed,
            tokens=data.tokens,
            frames=None if data.frames == "auto" else data.frames,
            objective=train.objective,
            max_seqlen=data.longest,
            seed=train.seed,
        )
        plan = Plan(table, mixed, capacities, train.objective, train.seed, train.total_samples, data.window)
    except (ValueError, OSError) as error:
        raise ConfigError(f"data.train = {list(data.train)}: {error}") from error
    return TrainingData(tokenizer=tokenizer, shards=shards, indexes=indexes, table=table, plan=plan)


def open_loader(config: RunConfig, data: TrainingData, world: World, start: PlanState) -> PackLoader:
    """The steps of this rank, from `start` on."""
    return PackLoader(
        data.plan,
        data.shards,
        data.indexes,
        data.tokenizer,
        config.model.frame_size,
        rank=world.rank,
        world_size=world.size,
        packs_per_step=config.train.packs_per_step,
        num_workers=config.data.num_workers,
        start=start,
        device=world.device,
        max_bad_share=config.data.max_bad_share,
    )


def find_init(name: str) -> str:
    """What `init_from` names, for `from_pretrained`: a run's best weights, a checkpoint's, a folder or file, a hub id.

    Raises ConfigError if there is no such thing.
    """
    if name.startswith(HUB):
        return name.removeprefix(HUB)
    path = Path(name)
    if not path.exists():
        raise ConfigError(
            f"init_from = {name!r}: no such file or folder ({path.absolute()}); "
            f"expected a run's folder, a checkpoint, a model folder or file, or {HUB}owner/name"
        )
    checkpoints = path / "checkpoints"
    if checkpoints.is_dir():
        chosen = read_pointer(checkpoints / "best") or read_pointer(checkpoints / "latest")
        if chosen is None:
            raise ConfigError(f"init_from = {name!r}: this run has no checkpoint yet")
        path = checkpoints / chosen
    return str(path / "weights" if (path / "weights").is_dir() else path)


def load_model(config: RunConfig, vocab_size: int, resumed: Path | None = None) -> FoveatedVLM | MultiTokenVLM:
    """The configured model on the CPU in fp32, with the weights of `init_from`, of its back bones, or random ones.

    `vocab_size` is the tokenizer's: `tiny` takes it, any other model has to have as many; `resumed` is a checkpoint of
    the run itself, which then needs nothing else. Frozen groups are marked. Raises ConfigError for weights that are not
    there or do not fit, and for a vocabulary smaller than the tokenizer's.
    """
    torch.manual_seed(config.train.seed)
    chosen, init = config.model, str(resumed) if resumed else config.init_from
    try:
        if init is not None:
            source = find_init(init)
            weights, found = convert.locate(source)
            geometry = (
                FoveatedConfig(**{**found.to_dict(), **chosen.overrides}) if found else _geometry(chosen, vocab_size)
            )
            model = model_class(geometry).from_pretrained(weights, config=geometry)
        elif chosen.preset == "tiny":
            model = build_model(tiny_config(vocab_size, **chosen.overrides))
        else:
            cls = MultiTokenVLM if chosen.architecture == "multi_token" else FoveatedVLM
            model = cls.from_backbones(*chosen.backbones, **chosen.overrides)
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        what = f"init_from = {init!r}" if init else f"model = {chosen.backbones}"
        raise ConfigError(f"{what}: {error}") from error
    _require_room(model, vocab_size, config, init)
    freeze(model, config.train.freeze)
    return model.train()


def _require_room(model: FoveatedVLM | MultiTokenVLM, vocab_size: int, config: RunConfig, init: str | None) -> None:
    """Raises ConfigError where the tokenizer gives ids that the model has no embedding for."""
    found = model.config.llm_config.vocab_size
    if found < vocab_size:
        source = f"init_from = {init!r}" if init else f"model = {config.model.backbones}"
        raise ConfigError(
            f"{source}: vocabulary of {found} tokens, but data.tokenizer = {config.tokenizer!r} has {vocab_size}; "
            f"choose the tokenizer that this model was trained with"
        )


def _geometry(chosen: ModelConfig, vocab_size: int) -> FoveatedConfig:
    """For weights that come without one, such as published `.pt` files."""
    if chosen.preset == "tiny":
        return tiny_config(vocab_size, **chosen.overrides)
    llm, vision = (AutoConfig.from_pretrained(name) for name in chosen.backbones)
    return FoveatedConfig(llm_config=llm, vision_config=vision, **chosen.overrides)
