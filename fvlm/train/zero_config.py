"""DeepSpeed's JSON, completed from the run configuration: what both need is `"auto"` there and filled here."""

from __future__ import annotations

import copy
import json
from typing import Any

from fvlm.config import REPOSITORY, TrainConfig, resolve
from fvlm.schema import ConfigError

OWNED_BY_RUN = {
    "optimizer": "train.learning_rate, train.betas, train.eps and train.weight_decay",
    "scheduler": "train.schedule and train.warmup",
    "fp16": "train.dtype",
    "torch_autocast": "train.dtype",
    "data_efficiency": "data",
    "curriculum_learning": "data",
}


def read_zero_json(name: str) -> tuple[dict[str, Any], str]:
    """(contents, file name) of a DeepSpeed JSON: a path, or a bare name in `ds_configs`. Raises ConfigError."""
    path = resolve(name, REPOSITORY / "ds_configs", ".json")
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(contents, dict):
        raise ConfigError(f"{path}: expected an object, got {type(contents).__name__}")
    return contents, path.name


def accumulation(train: TrainConfig, world_size: int) -> int:
    """Micro-batches of one step on each rank; raises ConfigError where the packs do not divide evenly."""
    if train.packs_per_step % world_size:
        raise ConfigError(
            f"train.packs_per_step = {train.packs_per_step}: expected a multiple of the {world_size} ranks; "
            f"nearest: {max(1, round(train.packs_per_step / world_size)) * world_size}"
        )
    return train.packs_per_step // world_size


def resolve_dtype(train: TrainConfig, on_gpu: bool) -> str:
    """`bf16` or `fp32`."""
    return train.dtype if train.dtype != "auto" else ("bf16" if on_gpu else "fp32")


def zero_stage(contents: dict[str, Any]) -> int:
    """ZeRO stage that a DeepSpeed JSON asks for; 0 where it does not say."""
    return int(contents.get("zero_optimization", {}).get("stage", 0))


def fill(contents: dict[str, Any], origin: str, train: TrainConfig, world_size: int, dtype: str) -> dict[str, Any]:
    """A copy of DeepSpeed's JSON `contents` in which every value that the run YAML decides has that value.

    Raises ConfigError, naming `origin`, both keys and both values, where the JSON says something else.
    """
    for key, owner in OWNED_BY_RUN.items():
        section = contents.get(key)
        if section is not None and not (isinstance(section, dict) and section.get("enabled") is False):
            raise ConfigError(f"{origin}: section {key!r} is decided by {owner} of the run YAML; remove it here")
    stage = zero_stage(contents)
    filled = copy.deepcopy(contents)
    micro_batches = accumulation(train, world_size)
    decided: list[tuple[str, Any, str]] = [
        ("train_micro_batch_size_per_gpu", 1, "one pack, see data.frames and data.tokens"),
        ("gradient_accumulation_steps", micro_batches, f"train.packs_per_step over {world_size} ranks"),
        ("train_batch_size", train.packs_per_step, "train.packs_per_step"),
        ("gradient_clipping", train.clip, "train.clip"),
        ("bf16.enabled", dtype == "bf16", f"train.dtype, resolved to {dtype}"),
    ]
    if dtype == "bf16":  # a non-finite gradient is then caught before the update, as it always is in fp32
        decided.append(("bf16.check_grad_overflow", True, "the guard"))
    if stage > 0:  # DeepSpeed refuses it for stage 0, where gradients accumulate in the parameters' own type
        decided.append(("data_types.grad_accum_dtype", "fp32", "fp32 accumulation"))
    for key, value, owner in decided:
        _decide(filled, key, value, owner, origin)
    if filled.get("data_types", {}).get("grad_accum_dtype") == "auto":
        del filled["data_types"]["grad_accum_dtype"]
    _no_auto_left(filled, origin, "")
    return filled


def _decide(filled: dict[str, Any], key: str, value: Any, owner: str, origin: str) -> None:
    section = filled
    *parents, last = key.split(".")
    for parent in parents:
        section = section.setdefault(parent, {})
        if not isinstance(section, dict):
            raise ConfigError(f"{origin}: {parent} = {section!r}: expected an object")
    given = section.get(last, "auto")
    if given != "auto" and given != value:
        raise ConfigError(
            f'{origin}: {key} = {given!r} contradicts {value!r} ({owner}); write "auto" in the JSON '
            f"or change the run YAML"
        )
    section[last] = value


def _no_auto_left(section: Any, origin: str, path: str) -> None:
    if isinstance(section, dict):
        for key, value in section.items():
            _no_auto_left(value, origin, f"{path}.{key}" if path else key)
    elif section == "auto":
        raise ConfigError(f'{origin}: {path} = "auto": the run YAML has no value for it; write one')
