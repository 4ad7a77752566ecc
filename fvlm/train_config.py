"""The training section of a run's configuration: objective, optimizer, schedule, guard."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from fvlm.schema import OPERATIONAL, ConfigError, require

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
    new_level_after: int = field(default=4, **OPERATIONAL)
    """Steps left out in a row for their gradient's norm alone, after which the next such step counts and the window
    begins with it: the weights are the cause, not the data, and do not change without a step; 0: never."""
    llm_bottom: int | None = None
    """Layers of the language model, from the first on, that `freeze_llm_bottom` freezes; decided before the run."""

    def __post_init__(self) -> None:
        require(self.sigmas >= 0, "train.guard.sigmas", self.sigmas, "0 or more")
        require(self.window >= 2, "train.guard.window", self.window, "at least 2")
        require(self.max_skips >= 1, "train.guard.max_skips", self.max_skips, "at least 1")
        require(self.new_level_after >= 0, "train.guard.new_level_after", self.new_level_after, "0 or more")
        bottom = self.llm_bottom
        require(bottom is None or bottom >= 1, "train.guard.llm_bottom", bottom, "at least 1")
        if self.policy == "freeze_llm_bottom":
            require(bottom is not None, "train.guard.llm_bottom", bottom, "a number of layers with this policy")


@dataclass(frozen=True, kw_only=True, slots=True)
class FreezeUntil:
    """A part that is frozen over the first share of the run, and trained after it."""

    part: str
    """As in `train.freeze`."""
    until: float
    """Share of the run's samples."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """Low-rank adapters on the language model's matrices, which are frozen themselves (docs/training.md)."""

    rank: int = 16
    """Of each adapter."""
    alpha: float = 32.0
    """The adapters' product counts alpha / rank times."""
    targets: str | tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Linear layers of the trunk: names, or one regular expression for whole paths such as layers.0.mlp.up_proj."""
    dora: bool = False
    """DoRA: the length of each row of a matrix is trained apart from its direction."""

    def __post_init__(self) -> None:
        require(self.rank >= 1, "train.lora.rank", self.rank, "at least 1")
        require(self.alpha > 0, "train.lora.alpha", self.alpha, "above 0")
        require(len(self.targets) > 0, "train.lora.targets", self.targets, "at least one linear layer")
        if isinstance(self.targets, str):
            try:
                re.compile(self.targets)
            except re.error as error:
                raise ConfigError(f"train.lora.targets = {self.targets!r}: not a regular expression: {error}") from None


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
    freeze: tuple[str | FreezeUntil, ...] = ()
    """Parts that are not trained: connector, dino, llm, or `llm:8`, the language model's first eight layers; with
    `{part: llm, until: 0.2}` only over the first fifth of the samples."""
    lora: LoraConfig | None = None
    """Adapters instead of the language model's own weights; needs `peft`."""
    activation_checkpointing: bool | CheckpointingConfig = False
    """Recompute blocks in the backward pass: less memory, about a third more work; true: all of them."""
    compile: bool = field(default=False, **OPERATIONAL)
    """Compile a block of each kind with torch.compile: minutes at the start; meant for a GPU (docs/kernels.md)."""
    cuda_graphs: bool = field(default=False, **OPERATIONAL)
    """Record forward and backward pass once and replay them: no launches, more memory; GPU only (docs/kernels.md)."""
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
        self._require_freezable()
        coarse_loss_fits = self.lambda_coarse == 0 or self.mode == "coarse_fine"
        require(coarse_loss_fits, "train.lambda_coarse", self.lambda_coarse, "0 unless train.mode = coarse_fine")
        for group in GROUPS:
            rate, key = getattr(self.learning_rate, group), f"train.learning_rate.{group}"
            require(rate.base > 0, f"{key}.base", rate.base, "above 0; to freeze a group use train.freeze")
            converging = self.schedule == "converging"
            expected = "a rate with schedule: converging, else null"
            require((rate.target is not None) == converging, f"{key}.target", rate.target, expected)

    def _require_freezable(self) -> None:
        for place, entry in enumerate(self.freeze):
            key, part = f"train.freeze[{place}]", entry.part if isinstance(entry, FreezeUntil) else entry
            known = part in GROUPS or re.fullmatch(r"llm:[1-9]\d*", part)
            require(bool(known), key, part, "connector, dino, llm, or llm:K for the language model's first K layers")
            if isinstance(entry, FreezeUntil):
                require(0 < entry.until < 1, f"{key}.until", entry.until, "a share of the run, above 0 and below 1")
            if self.lora is not None:
                expected = "no part of the language model, which train.lora freezes; {part, until} delays the adapters"
                require(isinstance(entry, FreezeUntil) or not part.startswith("llm"), key, part, expected)
        parts = [entry.part if isinstance(entry, FreezeUntil) else entry for entry in self.freeze]
        require(len(set(parts)) == len(parts), "train.freeze", parts, "each part once")
        require(not set(GROUPS) <= set(parts), "train.freeze", parts, "at least one group left to train at any time")
        bottoms = {int(part[4:]) for part in self._until if part.startswith("llm:")} | {self.guard.llm_bottom}
        expected = "the same number of first layers in every llm:K with until, and in train.guard.llm_bottom"
        require(len(bottoms - {None}) <= 1, "train.freeze", parts, expected)
        contradicts = any(":" in part for part in self._until) and any(part.startswith("llm") for part in self.frozen)
        expected = "no llm:K with until beside a part of the language model that is never trained"
        require(not contradicts, "train.freeze", parts, expected)

    @property
    def _until(self) -> dict[str, float]:
        return {entry.part: entry.until for entry in self.freeze if isinstance(entry, FreezeUntil)}

    @property
    def frozen(self) -> tuple[str, ...]:
        """Parts that are never trained."""
        return tuple(part for part in self.freeze if isinstance(part, str))

    def frozen_at(self, progress: float) -> frozenset[str]:
        """Parts that are frozen for a time, at a step that ends at `progress`, in [0, 1]: groups, or `llm_bottom`."""
        return frozenset(
            "llm_bottom" if ":" in part else part for part, until in self._until.items() if progress <= until
        )

    @property
    def llm_bottom(self) -> int | None:
        """First layers of the language model that are frozen, for a time or by the guard, apart from the rest."""
        cut = (int(part.partition(":")[2]) for part in self._until if ":" in part)
        return next(cut, self.guard.llm_bottom)

    @property
    def checkpointing(self) -> CheckpointingConfig:
        """`activation_checkpointing` as shares."""
        chosen = self.activation_checkpointing
        return CheckpointingConfig(encoder=float(chosen), llm=float(chosen)) if isinstance(chosen, bool) else chosen
