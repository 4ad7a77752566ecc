"""How long a step takes, predicted: necessary operations at an assumed utilisation, launches, and transfers.

Nothing here was measured; bf16 throughout. Every assumption is a constant with its source, and what a benchmark
measured replaces it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fvlm.model import FoveatedConfig
from fvlm.model.flops import Sample, flops_per_sample
from fvlm.train.gpus import Gpu
from fvlm.train.memory import Parameters
from fvlm.train.traffic import gathers_of, sent, step_messages, use_order
from fvlm.train.zero_config import zero_stage
from fvlm.train_config import CheckpointingConfig

# Share of the peak that forward, backward and recomputation reach while the GPU computes. Public figures for models of
# these sizes: ViT-S training 23 %, small language models 41 to 50 % (nanochat d12, Megatron and picotron 1.7B); ours is
# a ViT-S with a language model of 135M, 360M or 1.7B, weighted by their work.
ASSUMED_MFU = {"135m": 0.25, "360m": 0.30, "1b7": 0.40}
LAUNCH_SECONDS = 6e-6  # of an operation in eager mode; torch's own overhead is 5 to 10 µs on current processors
LINK_SHARE = 0.7  # of a link's rate that large collectives reach
HOST_SHARE = 0.8  # of PCIe's that pinned copies reach
HOST_MEMORY = 60e9  # bytes a second of the host's memory that one rank's CPU optimizer gets
ADAM_BYTES = 28  # read and written a parameter: master, two moments, gradient
FILL = 0.97  # of a pack's rows (a simulated stage-2 mix: 97 % of frames, 99 % of tokens)


# Of each stage, a mean sample. Assumed; `launch/plan.py --propose` finds the real one from an index.
SAMPLES = {
    # one caption of about 150 tokens on a clip of about 8 frames; 14 % text of about 400
    "stage1": Sample(frames=7, visual=7, tokens=220, coarse=25, labels=210),
    # 4.6 distinct frames and 180 to 250 tokens a sample, stills looked at 8 times, answers labelled
    "stage2": Sample(frames=4.6, visual=12, tokens=215, coarse=30, labels=90),
    # a still looked at 8 times, question and two answers of about 100 tokens: a pair is one sample here
    "dpo": Sample(frames=1, visual=16, tokens=330, coarse=40, labels=200),
}
# As launch/configs has them. With a second one in every other step a model keeps frame by frame what it learned in two
# passes (docs/results).
FINE_ITERATIONS = {"stage1": (1,), "stage2": (1, 2), "dpo": (1,)}
TOTAL_SAMPLES = {"stage1": 1_000_000, "stage2": 1_000_000, "dpo": 83_000}


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one step, predicted."""

    compute: float
    """Forward, backward, recomputation: operations at the assumed utilisation, or launches where these take longer."""
    communication: float
    """Between ranks, not hidden behind anything."""
    offload: float
    """Transfers to and from the host, and its optimizer."""
    optimizer: float
    samples: float
    necessary_flops: float
    """Of one rank."""

    @property
    def seconds(self) -> float:
        """All of it, one after the other."""
        return self.compute + self.communication + self.offload + self.optimizer


def step_time(
    geometry: FoveatedConfig,
    parameters: Parameters,
    sample: Sample,
    gpu: Gpu,
    *,
    tokens: int,
    micro_batches: int,
    ranks: int,
    zero: Mapping[str, Any],
    checkpointing: CheckpointingConfig,
    num_ops: int,
    mfu: float,
    fine_iterations: Sequence[int] = (1,),
) -> StepTime:
    """Mean time of a step of `micro_batches` packs of `tokens` rows on each rank, fine iterations taken in turn."""
    samples = FILL * tokens / sample.tokens
    recompute = (checkpointing.encoder, checkpointing.llm)
    flops = flops_per_sample(geometry, sample, fine_iterations=fine_iterations, recompute=recompute)
    busy = samples * flops.executed / (gpu.peak * mfu)
    compute = micro_batches * max(busy, num_ops * LAUNCH_SECONDS)
    offloaded = zero.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none") != "none"
    share = parameters.trained / ranks
    gathers = gathers_of(use_order(geometry)) if zero_stage(dict(zero), "bf16") == 3 else 0.0
    messages = step_messages(parameters, zero, "bf16", micro_batches, gathers)
    communication = sent(messages, ranks) / (gpu.link * LINK_SHARE)
    offload = 0.0
    if offloaded:  # bf16 sums go down and up in every micro-batch, the weights up once
        moved = (4 * micro_batches + 2) * share
        offload = moved / (gpu.host * HOST_SHARE) + ADAM_BYTES * share / HOST_MEMORY
    return StepTime(
        compute=compute,
        communication=communication,
        offload=offload,
        optimizer=0.0 if offloaded else ADAM_BYTES * share / gpu.bandwidth,
        samples=samples * micro_batches * ranks,
        necessary_flops=samples * flops.training * micro_batches,
    )
