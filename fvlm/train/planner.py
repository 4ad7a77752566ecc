"""Which configuration fits a GPU and is predicted fastest: ZeRO stage, offload, checkpointing, budgets F and T."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from typing import Any

import torch

from fvlm.data.batch import PackLayout
from fvlm.data.capacities import Capacities
from fvlm.data.loader import num_buffers
from fvlm.model import FoveatedConfig
from fvlm.model.configuration import preset_config
from fvlm.model.flops import Sample
from fvlm.train.dry_run import DryRun, dry_run, meta_model
from fvlm.train.gpus import GIB, Gpu
from fvlm.train.memory import (
    EngineMemory,
    Parameters,
    count_parameters,
    engine_memory,
    host_memory,
    keeps_gradients,
)
from fvlm.train.work_model import ASSUMED_MFU, FINE_ITERATIONS, SAMPLES, TOTAL_SAMPLES, StepTime, step_time
from fvlm.train.zero_config import read_zero_json
from fvlm.train_config import CheckpointingConfig, LoraConfig

CONTEXT_GIB = 0.6  # CUDA context with cuBLAS workspaces; what nvidia-smi shows of an idle torch process is 0.4 to 0.6
NCCL_GIB = 0.5  # buffers of a communicator on several ranks, of the order that NCCL's default channels take
FRAGMENTATION = 0.06  # of all that is allocated: torch's caching allocator rounds and splits; to be measured
TOKENS = (16384, 8192, 32768, 4096, 2048)  # of equally fast ones, the first
MEASURED_AT = (4096, 16384)  # budgets whose dry runs all GPUs share; in between and beyond, memory is all but affine
CHECKPOINTING = tuple(CheckpointingConfig(encoder=e, llm=x) for e, x in product((0.0, 1.0), (0.0, 0.5, 1.0)))
ZERO = ("zero1", "zero2", "zero2_offload", "zero3")  # in bf16, zero0 runs as zero1
UNSURE = 1.1  # estimates above this share of the limit are not worth a dry run of their own
SHARING = ("zero3",)  # what it saves, it saves by sharing
WORKERS = 8  # of each rank: data.num_workers of the stages' configurations
LONGEST = 8192  # tokens of the longest sample: the language model's context


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to plan for."""

    model: str
    """`135m`, `360m` or `1b7`."""
    stage: str
    """`stage1`, `stage2` or `dpo`."""
    gpu: Gpu
    ranks: int
    step_tokens: int = 131_072
    """Rows of a step over all ranks; rounded up to whole packs of each."""
    limit: float
    """GiB of each GPU that may be used."""
    mfu: float | None = None
    """Measured utilisation; None: `ASSUMED_MFU`."""
    price: float | None = None
    """US dollars of a GPU hour; None: the table's."""
    host_limit: float | None = None
    """GiB of the machine's own memory; None: as much as it takes."""

    def micro_batches(self, tokens: int) -> int:
        """Packs of `tokens` rows that each rank takes in a step."""
        return math.ceil(self.step_tokens / tokens / self.ranks)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One configuration, with everything predicted of it."""

    zero: str
    checkpointing: CheckpointingConfig
    capacities: Capacities
    memory: dict[str, float]
    """Bytes by component at the worst moment."""
    host: dict[str, float]
    """Bytes of the machine's own memory by component, over all ranks."""
    time: StepTime

    @property
    def total(self) -> float:
        """Bytes of one GPU."""
        return sum(self.memory.values())

    @property
    def samples_per_second(self) -> float:
        """Over all ranks."""
        return self.time.samples / self.time.seconds


def capacities_for(sample: Sample, tokens: int, longest: int = LONGEST) -> Capacities:
    """Worst-case pack of a stage: F balanced with T, the others with the margin that packs of short samples need."""

    def up(share: float, multiple: int, most: int) -> int:
        return min(max(math.ceil(tokens * share / multiple), 1) * multiple, most)

    frames = max(up(1.015 * sample.frames / sample.tokens, 4, tokens), 64)  # a whole video of 64 frames fits
    return Capacities(
        frames=frames,
        tokens=tokens,
        visual=max(up(1.2 * sample.visual / sample.tokens, 64, tokens), 64),
        coarse=max(up(1.2 * sample.coarse / sample.tokens, 64, tokens), 128),
        samples=up(1.5 / sample.tokens, 8, tokens),
        labels=up(1.1 * sample.labels / sample.tokens, 64, tokens),
        max_seqlen=min(longest, tokens),
    )


@cache
def geometry_of(model: str) -> FoveatedConfig:
    """The published geometry."""
    return preset_config(model)


@cache
def parameters_of(model: str) -> Parameters:
    """Its numbers of parameters."""
    return count_parameters(meta_model(geometry_of(model), torch.bfloat16))


@cache
def run_dry(
    model: str, stage: str, capacities: Capacities, checkpointing: CheckpointingConfig, keep_gradients: bool
) -> DryRun:
    """A dry run in bf16 with the Triton kernels, as on a GPU, of the stage's longest step."""
    call = {"checkpointing": checkpointing, "keep_gradients": keep_gradients}
    return dry_run(geometry_of(model), capacities, **call, fine_iterations=max(FINE_ITERATIONS[stage]))


def components(dry: DryRun, engine: EngineMemory, ranks: int) -> dict[str, float]:
    """Bytes by component at the worst moment: in a micro-batch's backward pass, or in the step after it."""
    names = {"pack": "pack", "activations": "activations", "temporaries": "backward temporaries",
             "gradients": "gradients", "kernels": "kernels' scratch", "logits": "logits' scratch"}  # fmt: skip
    moment = {names[name]: float(size) for name, size in dry.peak.items()}
    if sum(moment.values()) + engine.buckets < engine.reduce:
        moment, buckets = {"reduction of gradients": engine.reduce}, 0.0
    else:
        buckets = engine.buckets
    moment["gradients"] = moment.get("gradients", 0.0) + engine.gradients
    found = {"weights": engine.weights, "fp32 masters": engine.masters, "Adam moments": engine.moments} | moment
    found["DeepSpeed's buffers"] = buckets
    found["fragmentation"] = FRAGMENTATION * sum(found.values())
    found["CUDA context"] = GIB * (CONTEXT_GIB + (NCCL_GIB if ranks > 1 else 0))
    return {name: size for name, size in found.items() if size}


def predict(
    geometry: FoveatedConfig,
    capacities: Capacities,
    zero: Mapping[str, Any],
    ranks: int,
    *,
    dtype: str,
    checkpointing: CheckpointingConfig,
    freeze: tuple[str, ...] = (),
    lora: LoraConfig | None = None,
    backend: str = "triton",
    **call: Any,
) -> dict[str, float]:
    """Bytes by component of any model and configuration; the arguments are `dry_run`'s and `engine_memory`'s."""
    precision = torch.bfloat16 if dtype == "bf16" else torch.float32
    dry = dry_run(
        geometry,
        capacities,
        checkpointing=checkpointing,
        dtype=precision,
        keep_gradients=keeps_gradients(zero, dtype),
        freeze=freeze,
        lora=lora,
        backend=backend,
        **call,
    )
    parameters = count_parameters(meta_model(geometry, precision, freeze, lora))
    return components(dry, engine_memory(parameters, zero, ranks, dtype), ranks)


def propose(request: Request, progress: Callable[[str], None] = lambda text: None) -> Choice | None:
    """The fastest configuration that fits, or None.

    Packs that take the longest samples come first, then speed; of those that are equally fast, the simpler one. Whether
    one fits is asked in this order, of a dry run of its own.
    """
    candidates = []
    for name, checkpointing, tokens in product(ZERO, CHECKPOINTING, TOKENS):
        progress(f"{request.model}, {request.gpu.name} x {request.ranks}: {_recomputed(checkpointing)}")
        zero, _ = read_zero_json(name)
        if request.ranks == 1 and name in SHARING:
            continue
        engine = engine_memory(parameters_of(request.model), zero, request.ranks, "bf16")
        size, num_ops = _estimate(request.model, request.stage, checkpointing, tokens)
        if engine.state + size > UNSURE * request.limit * GIB:
            continue
        host = host_of(request, engine, capacities_for(SAMPLES[request.stage], tokens))
        if request.host_limit is not None and sum(host.values()) > request.host_limit * GIB:
            continue
        time = _time(request, zero, checkpointing, tokens, num_ops)
        speed = float(f"{time.samples / time.seconds:.3g}")
        candidates.append((-min(tokens, LONGEST), -speed, len(candidates), name, zero, checkpointing, tokens))
    for *_, name, zero, checkpointing, tokens in sorted(candidates, key=lambda found: found[:3]):
        capacities = capacities_for(SAMPLES[request.stage], tokens)
        progress(f"{request.model}, {request.gpu.name} x {request.ranks}: {name}, T = {tokens}")
        choice = evaluate(request, name, zero, checkpointing, capacities)
        if choice.total <= request.limit * GIB:
            return choice
    return None


def host_of(request: Request, engine: EngineMemory, capacities: Capacities) -> dict[str, float]:
    """Bytes of the machine's own memory by component."""
    objective = "dpo" if request.stage == "dpo" else "ce_all"
    pack = PackLayout(capacities, geometry_of(request.model).image_size, objective).nbytes
    buffers = num_buffers(WORKERS, request.micro_batches(capacities.tokens)) * pack
    return host_memory(parameters_of(request.model), engine, request.ranks, "bf16", buffers)


def evaluate(
    request: Request, name: str, zero: Mapping[str, Any], checkpointing: CheckpointingConfig, capacities: Capacities
) -> Choice:
    """Memory and time of one configuration."""
    parameters = parameters_of(request.model)
    engine = engine_memory(parameters, zero, request.ranks, "bf16")
    dry = run_dry(request.model, request.stage, capacities, checkpointing, keeps_gradients(zero, "bf16"))
    time = _time(request, zero, checkpointing, capacities.tokens, dry.num_ops)
    return Choice(
        zero=name,
        checkpointing=checkpointing,
        capacities=capacities,
        memory=components(dry, engine, request.ranks),
        host=host_of(request, engine, capacities),
        time=time,
    )


def _time(
    request: Request, zero: Mapping[str, Any], checkpointing: CheckpointingConfig, tokens: int, num_ops: int
) -> StepTime:
    return step_time(
        geometry_of(request.model),
        parameters_of(request.model),
        SAMPLES[request.stage],
        request.gpu,
        tokens=tokens,
        micro_batches=request.micro_batches(tokens),
        ranks=request.ranks,
        zero=zero,
        checkpointing=checkpointing,
        num_ops=num_ops,
        mfu=request.mfu or ASSUMED_MFU[request.model],
        fine_iterations=FINE_ITERATIONS[request.stage],
    )


def _estimate(model: str, stage: str, checkpointing: CheckpointingConfig, tokens: int) -> tuple[float, int]:
    """Bytes of a micro-batch, about, and its operations: from two dry runs, by a line through them."""
    sample = SAMPLES[stage]
    low, high = (run_dry(model, stage, capacities_for(sample, t), checkpointing, False) for t in MEASURED_AT)
    slope = (high.total - low.total) / (MEASURED_AT[1] - MEASURED_AT[0])
    return max(0.0, low.total + slope * (tokens - MEASURED_AT[0])), high.num_ops


def _recomputed(checkpointing: CheckpointingConfig) -> str:
    return f"recomputed {checkpointing.encoder:.0%} of the encoder, {checkpointing.llm:.0%} of the language model"


def summary(request: Request, choice: Choice) -> dict[str, Any]:
    """Everything that a plan says, as plain values; all of it predicted."""
    samples = TOTAL_SAMPLES[request.stage]
    hours = samples / choice.samples_per_second / 3600
    price = request.gpu.price if request.price is None else request.price
    mfu = request.mfu or ASSUMED_MFU[request.model]
    return {
        "predicted": True,
        "model": request.model,
        "stage": request.stage,
        "gpu": request.gpu.name,
        "gpus": request.ranks,
        "ds_config": f"{choice.zero}.json",
        "activation_checkpointing": asdict(choice.checkpointing),
        "capacities": asdict(choice.capacities),
        "packs_per_step": request.micro_batches(choice.capacities.tokens) * request.ranks,
        "memory_gib": {name: round(size / GIB, 3) for name, size in choice.memory.items()},
        "memory_total_gib": round(choice.total / GIB, 2),
        "memory_limit_gib": request.limit,
        "host_memory_gib": {name: round(size / GIB, 3) for name, size in choice.host.items()},
        "host_memory_total_gib": round(sum(choice.host.values()) / GIB, 2),
        "host_memory_limit_gib": request.host_limit,
        "step_seconds": {k: round(v, 4) for k, v in asdict(choice.time).items() if k not in _NOT_SECONDS},
        "samples_per_step": round(choice.time.samples, 1),
        "samples_per_second": round(choice.samples_per_second, 1),
        "mfu": round(choice.time.necessary_flops / choice.time.seconds / request.gpu.peak, 4),
        "utilisation": {"value": mfu, "origin": "measured" if request.mfu else "assumed"},
        "samples": samples,
        "hours": round(hours, 2),
        "gpu_hours": round(hours * request.ranks, 2),
        "usd_per_gpu_hour": {"value": price, "origin": "given" if request.price is not None else "assumed"},
        "usd": round(hours * request.ranks * price, 2),
    }


_NOT_SECONDS = ("samples", "necessary_flops")
