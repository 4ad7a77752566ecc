"""The training section of a run's configuration: objective, optimizer, schedule, guard."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from fvlm.schema import OPERATIONAL, require

GROUPS = ("connector", "dino", "llm")
"""Of parameters, each with a learning rate of its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupRate:
    """Learning rate of one parameter group."""

    base: float
    """Rate after warm-up."""
    target: float | None = None
    """Rate at the end; for `schedule: converging` only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LearningRates:
    """One rate for each parameter group."""

    connector: GroupRate
    dino: GroupRate
    llm: GroupRate


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointingConfig:
    """Share of each part's blocks that the backward pass computes again, spread evenly: 0.5 is every second block."""

    encoder: float = 0.0
    """Of DINOv2's blocks."""
    llm: float = 0.0
    """Of the language model's."""

    def __post_init__(self) -> None:
        for name in ("encoder", "llm"):
            require(0 <= getattr(self, name) <= 1, f"train.activation_checkpointing.{name}", getattr(self, name),
                     "a share between 0 and 1")  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardConfig:
    """What happens at a step whose loss or gradient is not finite or far above those before (docs/training.md)."""

    policy: Literal["skip", "stop", "roll_back", "freeze_dino", "freeze_llm", "freeze_llm_bottom"] = field(
        default="skip", **OPERATIONAL
    )
    """Beside leaving out the step: nothing; stop the run; go back to the newest checkpoint's weights; freeze a group
    from then on."""
    sigmas: float = field(default=6.0, **OPERATIONAL)
    """Standard deviations above the mean at which a loss or a gradient norm is a spike; 0: only NaN and infinity."""
    window: int = field(default=128, **OPERATIONAL)
    """Steps that mean and deviation are taken over; spikes are judged once half of them are there."""
    max_skips: int = field(default=8, **OPERATIONAL)
    """Steps left out in a row at which the run stops."""
    llm_bottom: int | None = None
    """Layers of the language model, from the first on, that `freeze_llm_bottom` freezes; decided before the run."""

    def __post_init__(self) -> None:
        require(self.sigmas >= 0, "train.guard.sigmas", self.sigmas, "0 or more")
        require(self.window >= 2, "train.guard.window", self.window, "at least 2")
        require(self.max_skips >= 1, "train.guard.max_skips", self.max_skips, "at least 1")
        bottom = self.llm_bottom
        require(bottom is None or bottom >= 1, "train.guard.llm_bottom", bottom, "at least 1")
        if self.policy == "freeze_llm_bottom":
            require(bottom is not None, "train.guard.llm_bottom", bottom, "a number of layers with this policy")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Objective, optimizer and schedule."""

    total_samples: int
    """Samples to see; the schedule ends exactly there."""
    packs_per_step: int
    """Packs of one optimizer step, over all ranks; divisible by their number."""
    learning_rate: LearningRates
    """Base and target rates by group."""
    objective: Literal["ce_all", "ce_answer", "dpo"] = "ce_all"
    """Cross-entropy on all text tokens, or on answers only; or preference pairs against the weights of the start."""
    dpo_beta: float = 0.1
    """Scale of the rewards of `dpo`."""
    mode: Literal["coarse_fine", "coarse_only"] = "coarse_fine"
    """Mode that is trained; autoregressive is for deployment, one frame after the other."""
    fine_iterations: tuple[int, ...] = (1,)
    """Fine passes, taken in turn step by step."""
    lambda_coarse: float = 0.0
    """Weight of the same loss computed with coarse tokens."""
    schedule: Literal["cosine", "constant", "converging", "hold_linear"] = "cosine"
    """Shape of the learning rates over the run (`fvlm.train.schedule`)."""
    warmup: float = 0.03
    """Share of the samples over which the rates rise."""
    optimizer: Literal["adamw", "deepspeed_fused", "deepspeed_cpu", "apex_fused"] = "adamw"
    """AdamW of torch (fused), DeepSpeed (for the GPU, and for the CPU with offload) or NVIDIA apex."""
    weight_decay: float = 0.01
    """AdamW's; norms, biases, queries and layer-scales are excluded."""
    betas: tuple[float, ...] = (0.9, 0.999)
    """AdamW's."""
    eps: float = 1e-8
    """AdamW's."""
    clip: float = 1.0
    """Largest norm of the gradient; 0: no clipping."""
    freeze: tuple[str, ...] = ()
    """Groups that are not trained: connector, dino, llm; or `llm:8`, the language model's first eight layers."""
    activation_checkpointing: bool | CheckpointingConfig = False
    """Recompute blocks in the backward pass: less memory, about a third more work; true: all of them."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 with fp32 master weights on a GPU, fp32 on a CPU."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """Against divergence."""
    seed: int = 42
    """Of the weights' initial values and of the data order."""
    preflight: bool | None = field(default=None, **OPERATIONAL)
    """Run the worst-case pack before the first step, so that what does not fit is known at once; null: on a GPU."""
    eval_every: int = field(default=500, **OPERATIONAL)
    """Steps between evaluations; 0: only at the end."""
    probe_every: int = field(default=50, **OPERATIONAL)
    """Steps between probes of the coarse loss; 0: never."""
    checkpoint_every: int = field(default=500, **OPERATIONAL)
    """Steps between checkpoints; 0: only at the end."""
    log_every: int = field(default=1, **OPERATIONAL)
    """Steps between records."""

    def __post_init__(self) -> None:
        for name in ("total_samples", "packs_per_step", "log_every"):
            require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "at least 1")
        for name in ("eval_every", "probe_every", "checkpoint_every", "clip", "weight_decay", "lambda_coarse"):
            require(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "0 or more")
        require(0 <= self.warmup < 1, "train.warmup", self.warmup, "a share of the run, at least 0 and below 1")
        iterations = self.fine_iterations
        require(bool(iterations) and min(iterations) >= 1, "train.fine_iterations", iterations, "numbers of at least 1")
        betas_fit = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        require(betas_fit, "train.betas", self.betas, "two numbers in [0, 1)")
        for place, group in enumerate(self.freeze):
            known = group in GROUPS or re.fullmatch(r"llm:[1-9]\d*", group)
            expected = "connector, dino, llm, or llm:K for the language model's first K layers"
            require(bool(known), f"train.freeze[{place}]", group, expected)
        require(set(self.freeze) != set(GROUPS), "train.freeze", self.freeze, "at least one group left to train")
        coarse_loss_fits = self.lambda_coarse == 0 or self.mode == "coarse_fine"
        require(coarse_loss_fits, "train.lambda_coarse", self.lambda_coarse, "0 unless train.mode = coarse_fine")
        for group in GROUPS:
            rate, key = getattr(self.learning_rate, group), f"train.learning_rate.{group}"
            require(rate.base > 0, f"{key}.base", rate.base, "above 0; to freeze a group use train.freeze")
            converging = self.schedule == "converging"
            expected = "a rate with schedule: converging, else null"
            require((rate.target is not None) == converging, f"{key}.target", rate.target, expected)

    @property
    def checkpointing(self) -> CheckpointingConfig:
        """`activation_checkpointing` as shares."""
        chosen = self.activation_checkpointing
        return CheckpointingConfig(encoder=float(chosen), llm=float(chosen)) if isinstance(chosen, bool) else chosen
