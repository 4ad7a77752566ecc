"""DeepSpeed's JSON, completed from the run configuration: what both need is `"auto"` there and filled here."""

from __future__ import annotations

import copy
import difflib
import json
from typing import Any

from fvlm.config import REPOSITORY, resolve
from fvlm.schema import ConfigError
from fvlm.train_config import TrainConfig

OWNED_BY_RUN = {
    "optimizer": "train.learning_rate, train.betas, train.eps and train.weight_decay",
    "scheduler": "train.schedule and train.warmup",
    "fp16": "train.dtype",
    "torch_autocast": "train.dtype",
    "data_efficiency": "data",
    "curriculum_learning": "data",
}

SECTIONS = (
    "activation_checkpointing", "aio", "autotuning", "bf16", "checkpoint", "comet", "comms_logger", "compile",
    "csv_monitor", "data_efficiency", "data_types", "expert_parallel", "flops_profiler", "fp16", "hybrid_engine",
    "optimizer", "pipeline", "scheduler", "tensor_parallel", "tensorboard", "timers", "torch_autocast", "wandb",
    "weight_quantization", "zero_optimization",
)  # fmt: skip
"""DeepSpeed's keys that hold an object. Its own reader passes over a key that it does not know."""

VALUES = (
    "communication_data_type", "dataloader_drop_last", "datastates_ckpt", "disable_allgather", "disable_python_gc",
    "dump_state", "gradient_accumulation_steps", "gradient_allreduce_op", "gradient_clipping",
    "gradient_predivide_factor", "log_level", "managed_gradient_accumulation", "memory_breakdown", "prescale_gradients",
    "seq_parallel_communication_data_type", "steps_per_print", "train_batch_size", "train_micro_batch_size_per_gpu",
    "use_data_before_expert_parallelism", "vocabulary_size", "wall_clock_breakdown", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
)  # fmt: skip
"""DeepSpeed's other keys; `bfloat16`, an old name that it ignores beside `bf16`, is left out."""

STAGES = (0, 1, 2, 3)


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


def zero_stage(contents: dict[str, Any], dtype: str = "fp32") -> int:
    """ZeRO stage that a DeepSpeed JSON asks for, to be checked by `fill`; 0 where it does not say.

    In bf16 a 0 runs as 1: DeepSpeed's stage 0 would sum the gradients of micro-batches in bf16.
    """
    stage = contents.get("zero_optimization", {}).get("stage", 0)
    return 1 if stage == 0 and stage is not False and dtype == "bf16" else stage


def fill(contents: dict[str, Any], origin: str, train: TrainConfig, world_size: int, dtype: str) -> dict[str, Any]:
    """A copy of DeepSpeed's JSON `contents` in which every value that the run YAML decides has that value.

    Raises ConfigError, naming `origin`, both keys and both values, where the JSON says something else, and where it
    has a key that DeepSpeed does not know, a section that is no object, or a ZeRO stage that does not exist.
    """
    for key, owner in OWNED_BY_RUN.items():
        section = contents.get(key)
        if section is not None and not (isinstance(section, dict) and section.get("enabled") is False):
            raise ConfigError(f"{origin}: section {key!r} is decided by {owner} of the run YAML; remove it here")
    _require_well_formed(contents, origin)
    offload = contents.get("zero_optimization", {}).get("offload_optimizer", {})
    if isinstance(offload, dict) and offload.get("device") == "nvme":
        raise ConfigError(
            f"{origin}: zero_optimization.offload_optimizer.device = 'nvme': checkpoints cannot hold optimizer states "
            f"on NVMe; offload to 'cpu'"
        )
    stage = zero_stage(contents, dtype)
    filled = copy.deepcopy(contents)
    if stage != zero_stage(contents):
        filled["zero_optimization"] = {**filled.get("zero_optimization", {}), "stage": stage}
    micro_batches = accumulation(train, world_size)
    decided: list[tuple[str, Any, str]] = [
        ("train_micro_batch_size_per_gpu", 1, "one pack, see data.frames and data.tokens"),
        ("gradient_accumulation_steps", micro_batches, f"train.packs_per_step over {world_size} ranks"),
        ("train_batch_size", train.packs_per_step, "train.packs_per_step"),
        ("gradient_clipping", train.clip, "train.clip"),
        ("bf16.enabled", dtype == "bf16", f"train.dtype, resolved to {dtype}"),
        ("timers.throughput.enabled", False, "the run's own records; it waits for the device twice a micro-batch"),
    ]
    if dtype == "bf16":  # true: with offload, a NaN stays in DeepSpeed's buffers and spoils every later step (0.19.8)
        decided.append(("bf16.check_grad_overflow", False, "the guard, which catches what is not finite"))
    if stage > 0:  # DeepSpeed refuses it for stage 0, which is fp32 throughout
        decided.append(("data_types.grad_accum_dtype", "fp32", "fp32 accumulation"))
    if "compute_grad_norm" in contents.get("zero_optimization", {}):
        decided.append(("zero_optimization.compute_grad_norm", True, "the guard"))
    for key, value, owner in decided:
        _decide(filled, key, value, owner, origin)
    if filled.get("data_types", {}).get("grad_accum_dtype") == "auto":
        del filled["data_types"]["grad_accum_dtype"]
    _no_auto_left(filled, origin, "")
    return filled


def _require_well_formed(contents: dict[str, Any], origin: str) -> None:
    known = (*SECTIONS, *VALUES)
    for key, value in contents.items():
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"expected some of {', '.join(sorted(known))}"
            raise ConfigError(f"{origin}: unknown key {key} = {value!r}; {hint}")
        if key in SECTIONS and not isinstance(value, dict):
            raise ConfigError(f"{origin}: {key} = {value!r}: expected an object")
    stage = zero_stage(contents)
    if type(stage) is not int or stage not in STAGES:  # JSON's true would pass for 1
        raise ConfigError(f"{origin}: zero_optimization.stage = {stage!r}: expected one of {STAGES}")


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
