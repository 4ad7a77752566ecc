"""What a configuration stands for: the data with its plan, and the model."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, PreTrainedTokenizerBase

from fvlm.config import ModelConfig, RunConfig
from fvlm.data.chat import load_tokenizer, tokenizer_hash
from fvlm.data.index_file import IndexFile
from fvlm.data.loader import PackLoader
from fvlm.data.plan import Capacities, Mixture, Plan, PlanState, SampleTable
from fvlm.data.remote import RemoteShard, find_all
from fvlm.data.shard import find_shards, load_index
from fvlm.data.shard_cache import ShardCache
from fvlm.data.table_store import open_table
from fvlm.model import FoveatedConfig, FoveatedVLM, MultiTokenVLM, build_model, convert, model_class, tiny_config
from fvlm.model.configuration import preset_config
from fvlm.schema import ConfigError
from fvlm.train import lora
from fvlm.train.checkpoint import read_pointer
from fvlm.train.engine import World
from fvlm.train.optimizer import freeze

logger = logging.getLogger(__name__)

HUB = "hf:"


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Shards, and the plan over them."""

    tokenizer: PreTrainedTokenizerBase
    shards: list[Path | RemoteShard]
    indexes: list[IndexFile]
    table: SampleTable
    plan: Plan
    cache: ShardCache | None
    """Of remote shards, where `data.cache_dir` is given."""

    def identity(self) -> dict[str, Any]:
        """What a resumed run has to find unchanged; `tars`: size and both ends of every shard, wherever it lies."""
        return {
            "plan": self.plan.fingerprint(),
            "tokenizer": tokenizer_hash(self.tokenizer),
            "shards": len(self.shards),
            "samples": len(self.table),
            "tars": hashlib.sha256(" ".join(index.tar_fingerprint for index in self.indexes).encode()).hexdigest()[:16],
        }


def mixture(config: RunConfig) -> Mixture:
    """The configured mixture, with what the model needs of each frame."""
    model, chosen = config.model, config.data.mixture
    grid = model.grid if model.architecture == "multi_token" else 0
    stated = {field.name: getattr(chosen, field.name) for field in fields(chosen)}
    return Mixture(**stated, tokens_per_frame=1 if grid else model.tokens_per_frame, grid=grid)


def load_data(config: RunConfig, after_each: Callable[[], None] = lambda: None) -> TrainingData:
    """Tokenizer, indexes and plan of the training samples, without those whose content is in the validation shards.

    `after_each` is called for every shard that was looked at: tars without an index are read through, which takes long.
    Raises ConfigError for shards that are not there, an empty data set, or a mixture or capacities that do not fit it.
    """
    data, train = config.data, config.train
    try:
        tokenizer = load_tokenizer(config.tokenizer)
    except (ValueError, OSError) as error:
        raise ConfigError(f"data.tokenizer = {config.tokenizer!r}: {error}") from error
    cache = ShardCache(data.cache_dir, 1e9 * data.cache_gb) if data.cache_dir else None
    mixed = mixture(config)
    contents = _contents(config, tokenizer, after_each) if data.val else None
    try:
        shards = find_all(data.train)
        opened = open_table(
            shards,
            tokenizer,
            data.cache_dir,
            cache=cache,
            held_out=contents,
            tags=mixed.tag_caps or (),
            after_each=after_each,
        )
        table = opened.table
        _log_held_out(opened.left_out)
        if not len(table):
            raise ValueError(f"{len(shards)} shards without a single sample that data.val does not hold")
        capacities = Capacities.propose(
            table,
            mixed,
            tokens=data.tokens,
            frames=None if data.frames == "auto" else data.frames,
            objective=train.objective,
            max_seqlen=data.longest,
            seed=train.seed,
            window=data.window,
        )
        plan = Plan(table, mixed, capacities, train.objective, train.seed, train.total_samples, data.window)
    except (ValueError, OSError) as error:
        raise ConfigError(f"data.train = {list(data.train)}: {error}") from error
    for note in plan.notes:
        logger.warning("%-8s %s", "mixture", note)
    return TrainingData(tokenizer=tokenizer, shards=shards, indexes=opened.indexes, table=table, plan=plan, cache=cache)


def _contents(config: RunConfig, tokenizer: PreTrainedTokenizerBase, after_each: Callable[[], None]) -> np.ndarray:
    """What the validation shards hold: uint64, ascending."""
    paths, contents = list(config.data.val), [np.zeros(0, np.uint64)]
    try:
        for shard in find_shards(paths):
            contents.append(load_index(shard, tokenizer, config.data.cache_dir).content)
            after_each()
    except (ValueError, OSError) as error:
        raise ConfigError(f"data.val = {paths}: {error}") from error
    return np.unique(np.concatenate(contents))


def _log_held_out(left_out: dict[str, int]) -> None:
    """How many samples of the shards have no row in the table, by source."""
    if num := sum(left_out.values()):
        by_source = ", ".join(f"{name} {count:,}" for name, count in Counter(left_out).most_common() if count)
        logger.info(
            "%-8s %s samples are in data.val by content and not trained on: %s", "held out", f"{num:,}", by_source
        )


def open_loader(
    config: RunConfig, data: TrainingData, world: World, start: PlanState, reference: np.ndarray | None = None
) -> PackLoader:
    """The steps of this rank, from `start` on; `reference` as `fvlm.train.reference` gives it."""
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
        cache=data.cache,
        reference=reference,
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
    there or do not fit, for a vocabulary smaller than the tokenizer's, and for adapters that cannot be.
    """
    torch.manual_seed(config.train.seed)
    chosen, init = config.model, str(resumed) if resumed else config.init_from
    try:
        if init is not None:
            source = find_init(init)
            weights, found = convert.locate(source)
            shape = FoveatedConfig(**{**found.to_dict(), **chosen.overrides}) if found else geometry(chosen, vocab_size)
            model = model_class(shape).from_pretrained(weights, config=shape)
        elif chosen.is_tiny:
            model = build_model(geometry(chosen, vocab_size))
        else:
            cls = MultiTokenVLM if chosen.architecture == "multi_token" else FoveatedVLM
            model = cls.from_backbones(*chosen.backbones, **chosen.overrides)
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        what = f"init_from = {init!r}" if init else f"model = {chosen.backbones}"
        raise ConfigError(f"{what}: {error}") from error
    _require_room(model, vocab_size, config, init)
    freeze(model, config.train.frozen)
    if config.train.lora is not None:
        lora.add_adapters(model, config.train.lora, config.train.seed)
        if resumed is not None:
            lora.restore_base(model, resumed)
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


def geometry(chosen: ModelConfig, vocab_size: int) -> FoveatedConfig:
    """The model's, without weights: for planning, and for published `.pt` files, which come without one.

    `vocab_size` is the tokenizer's, for the tiny models. Back bones other than the preset's are read for theirs; raises
    OSError where they are not there.
    """
    if chosen.is_tiny:
        return tiny_config(vocab_size, chosen.preset, **chosen.overrides)
    if chosen.llm is None and chosen.vision is None:
        return preset_config(chosen.preset, **chosen.overrides)
    llm, vision = (AutoConfig.from_pretrained(name) for name in chosen.backbones)
    return FoveatedConfig(llm_config=llm, vision_config=vision, **chosen.overrides)
