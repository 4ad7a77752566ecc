"""What DeepSpeed holds beside the activations, by ZeRO stage: bytes a parameter, and buffers of fixed size.

Read off DeepSpeed 0.19's optimizers and checked against them on CPU ranks (tests/train/test_planner.py). P is the
number of trained parameters, N of ranks; bf16 weights with fp32 masters, or fp32 weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from fvlm.train.zero_config import zero_stage

NORM_BYTES = 8  # the gradient's norm is summed in float64, a parameter at a time
REDUCED_AT_ONCE = 500_000_000  # elements that ZeRO-0 and 1 flatten for one all-reduce (`allreduce_gradients`)
MAX_LIVE = 1_000_000_000  # ZeRO-3's `stage3_max_live_parameters`, unless the JSON says otherwise
SNAPSHOT_BYTES = 12  # of each trained parameter, over all ranks: fp32 master and moments (`reshape.copy_to_host`)
LOADING_BYTES = 4  # of each parameter, on every rank: models are read in fp32 before they move to the device
HOST_BYTES = 22  # of each offloaded parameter: master, moments, gradient, its accumulator, and bf16 copy


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Numbers of elements of a model."""

    all: int
    trained: int
    largest: int
    """Of the largest trained parameter."""


def count_parameters(model: nn.Module) -> Parameters:
    """Elements of a model's parameters; tied ones count once."""
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    everything = sum(p.numel() for p in model.parameters())
    return Parameters(all=everything, trained=sum(trained), largest=max(trained))


@dataclass(frozen=True, kw_only=True)
class EngineMemory:
    """Bytes on each device."""

    weights: float
    masters: float
    moments: float
    gradients: float
    """What stays between micro-batches, in whatever precision DeepSpeed sums it."""
    buckets: float
    """Staging of reductions, gathered weights of ZeRO-3, the offload's transfer buffer."""
    reduce: float
    """After the last backward pass, when no activations live: gradients with their copies for the all-reduce of ZeRO-0
    and 1, or what the norm takes."""
    host: float
    """Bytes of the host's memory, where the optimizer is offloaded."""

    @property
    def state(self) -> float:
        """What is there from the second step on, whatever happens."""
        return self.weights + self.masters + self.moments + self.gradients


def keeps_gradients(zero: Mapping[str, Any], dtype: str) -> bool:
    """Whether parameters' own gradients live through the backward pass, beside what `EngineMemory` counts."""
    return zero_stage(dict(zero), dtype) < 2


def engine_memory(parameters: Parameters, zero: Mapping[str, Any], ranks: int, dtype: str) -> EngineMemory:
    """Memory of the engine for a DeepSpeed JSON's contents.

    Args:
        parameters: of the model.
        zero: the JSON's contents.
        ranks: N.
        dtype: `bf16` or `fp32`.
    """
    stage, section = zero_stage(dict(zero), dtype), zero.get("zero_optimization", {})
    item, trained, largest = (2 if dtype == "bf16" else 4), parameters.trained, parameters.largest
    share = trained / ranks
    frozen = item * (parameters.all - trained)
    if stage == 0 and dtype == "fp32":  # torch's AdamW on the weights themselves
        at_once = min(trained, REDUCED_AT_ONCE)
        return EngineMemory(
            weights=frozen + 4 * trained, masters=0, moments=8 * trained, gradients=0, buckets=0,
            reduce=4 * (trained + at_once), host=0,
        )  # fmt: skip
    offloaded = section.get("offload_optimizer", {}).get("device", "none") != "none"
    bucket = section.get("reduce_bucket_size", 500_000_000)
    weights = frozen + item * (share if stage == 3 else trained)
    # fp32 sums: all of them in ZeRO-0 and 1, a rank's own in ZeRO-2 and 3; fp32 weights' gradients are the sums
    sums = 4.0 * (trained if stage < 2 else share)
    if stage < 2 and dtype == "fp32":
        sums = 0.0
    at_once = min(trained, REDUCED_AT_ONCE)
    # the gradients themselves, and copies: flat and, for bf16, with the fp32 sums beside them
    copies = (6 if dtype == "bf16" else 4) * at_once
    reduce = item * trained + copies if stage < 2 else NORM_BYTES * largest
    buckets = 0.0 if stage < 2 else float(item * bucket)
    if stage > 1 and dtype == "bf16":  # what is reduced goes through fp32
        buckets += 4.0 * max(bucket, largest)
    if stage == 2 and dtype == "fp32":  # a micro-batch's own sums, before they are added to those so far
        buckets += 4.0 * share
    if stage == 3:
        prefetch = section.get("stage3_prefetch_bucket_size", 50_000_000)
        buckets += item * (min(trained, section.get("stage3_max_live_parameters", MAX_LIVE)) + prefetch)
    if offloaded:
        return EngineMemory(
            weights=weights, masters=0, moments=0, gradients=0, buckets=buckets + item * largest, reduce=0,
            host=HOST_BYTES * share,
        )  # fmt: skip
    return EngineMemory(
        weights=weights, masters=4 * share, moments=8 * share, gradients=sums, buckets=buckets, reduce=reduce, host=0,
    )  # fmt: skip


def host_memory(
    parameters: Parameters, engine: EngineMemory, ranks: int, dtype: str, buffers: float
) -> dict[str, float]:
    """Bytes of a machine's own memory by component, at the worse of two moments, beside Python and its libraries.

    Either all ranks are loading the model, or they train while a checkpoint is on its way to the disk.

    Args:
        parameters: of the model.
        engine: what `engine_memory` gives.
        ranks: N, all of them on this machine.
        dtype: `bf16` or `fp32`.
        buffers: bytes of one rank's packs on their way from the workers.
    """
    loading = {"models, while loading": float(LOADING_BYTES * parameters.all * ranks)}
    training = {
        "offloaded optimizer": engine.host * ranks,
        "checkpoint's copy, states": float(SNAPSHOT_BYTES * parameters.trained),
        "checkpoint's copy, weights": (2.0 if dtype == "bf16" else 4.0) * parameters.all,
        "packs of the loader": buffers * ranks,
    }
    worst = max(loading, training, key=lambda found: sum(found.values()))
    return {name: size for name, size in worst.items() if size}
