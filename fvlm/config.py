"""Run configuration: what an experiment is, from one YAML file and `key=value` overrides (see `load_config`).

What belongs to DeepSpeed lives in `ds_configs/*.json`; a value that both need is `"auto"` there and filled from here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from fvlm.schema import ConfigError, apply_override, build, read_mapping

REPOSITORY = Path(__file__).resolve().parent.parent
GROUPS = ("connector", "dino", "llm")
FIGURES = ("val_loss", "loss_fine", "loss_coarse", "loss_ratio", "attention_entropy")
SMOLLM = "HuggingFaceTB/SmolLM2-{}-Instruct"
BACKBONES = {
    "135m": (SMOLLM.format("135M"), "facebook/dinov2-small"),
    "360m": (SMOLLM.format("360M"), "facebook/dinov2-small"),
    "1b7": (SMOLLM.format("1.7B"), "facebook/dinov2-small"),
}
# Fields that change how a run is carried out, not what comes out of it: left out of the configuration's hash.
_operational = {"metadata": {"operational": True}}


def _require(condition: bool, key: str, value: Any, expected: str) -> None:
    if not condition:
        raise ConfigError(f"{key} = {value!r}: expected {expected}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Which network; `llm` and `vision` replace the preset's back bones."""

    preset: Literal["tiny", "135m", "360m", "1b7"] = "tiny"
    """Pair of back bones (README); `tiny` is built locally with random weights."""
    llm: str | None = None
    """Hugging Face id or local folder of a Llama model."""
    vision: str | None = None
    """Hugging Face id or local folder of a DINOv2 model."""
    architecture: Literal["foveated", "multi_token"] = "foveated"
    """`multi_token` is the pooled baseline."""
    image_size: int | None = None
    """Side of a frame in pixels, as prepared; the preset's (56 for tiny, else 224) unless given."""
    tokens_per_frame: int = 1
    """Looks at each video frame."""
    grid: Literal[1, 4, 16] = 4
    """Cells a frame of the multi-token baseline."""
    visual_scale: float = 0.14
    """Factor on every visual token."""
    deep_query: bool = True
    """False: the query looks at the final features only (ablation)."""
    query_logit_scale: float | Literal["learnable"] = 1.0
    """Factor on the query's attention logits; 2.0 is temperature 0.5."""
    random_queries: bool = False
    """Control experiment: queries are drawn, not written."""

    def __post_init__(self) -> None:
        if self.preset == "tiny":
            given = {"model.llm": self.llm, "model.vision": self.vision}
            for key, value in given.items():
                _require(value is None, key, value, "null with model.preset = tiny; choose 135m, 360m or 1b7")
        _require(self.tokens_per_frame >= 1, "model.tokens_per_frame", self.tokens_per_frame, "at least 1")
        size = self.image_size
        _require(size is None or (size > 0 and size % 14 == 0), "model.image_size", size, "a multiple of the patch, 14")

    @property
    def frame_size(self) -> int:
        """Side of a frame in pixels."""
        return self.image_size or (56 if self.preset == "tiny" else 224)

    @property
    def backbones(self) -> tuple[str, str]:
        """(language model, vision model); not for `tiny`."""
        llm, vision = BACKBONES[self.preset]
        return self.llm or llm, self.vision or vision

    @property
    def overrides(self) -> dict[str, Any]:
        """Fields that the model's own configuration takes by the same names."""
        names = ("architecture", "tokens_per_frame", "grid", "visual_scale", "deep_query", "query_logit_scale")
        return {name: getattr(self, name) for name in (*names, "random_queries")} | {"image_size": self.frame_size}


@dataclass(frozen=True, kw_only=True, slots=True)
class MixtureConfig:
    """Which samples, in which layouts; see `fvlm.data.plan.Mixture`."""

    weights: dict[str, float] | None = None
    """Source → weight; null: as many of each as there are."""
    text_share: float | None = None
    """Share of text-only samples, spread evenly; null: as in the data."""
    question_first: float = 0.0
    """Share of visual chat samples whose question comes before the frames."""
    narrated: float = 0.0
    """Share, among samples with narration, laid out as text between frames."""
    looks: int = 8
    """Visual tokens of a still."""

    def __post_init__(self) -> None:
        for name in ("text_share", "question_first", "narrated"):
            value = getattr(self, name)
            _require(value is None or 0 <= value <= 1, f"data.mixture.{name}", value, "a share between 0 and 1")
        _require(self.looks >= 1, "data.mixture.looks", self.looks, "at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Shards and how they become packs."""

    train: tuple[str, ...]
    """Shard files, folders or globs; relative to the working directory."""
    val: tuple[str, ...] = ()
    """Same, for the fixed validation set; none: no evaluation."""
    tokenizer: str | None = None
    """`tiny`, a Hugging Face id or a folder; null: the language model's own."""
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    """Mixture of the training samples."""
    tokens: int = 16384
    """Rows (text and visual tokens) a pack holds."""
    frames: int | Literal["auto"] = "auto"
    """Distinct frames a pack holds; auto: so many that frames and tokens run out together."""
    longest: int | None = None
    """Tokens, text and visual, of the longest sample that is taken (the language model's context); null: a pack's."""
    window: int = 4096
    """Samples that are ordered and packed together."""
    max_bad_share: float = 0.01
    """Share of unreadable samples at which the run stops."""
    num_workers: int = field(default=2, **_operational)
    """Reading processes of each rank; 0 reads in the training process."""
    cache_dir: str | None = field(default=None, **_operational)
    """Folder for the indexes of shards that come without one; null: such shards are an error."""

    def __post_init__(self) -> None:
        _require(len(self.train) > 0, "data.train", self.train, "at least one shard file, folder or glob")
        for name in ("tokens", "frames", "longest", "window"):
            value = getattr(self, name)
            _require(value in ("auto", None) or value >= 1, f"data.{name}", value, "at least 1")
        _require(self.num_workers >= 0, "data.num_workers", self.num_workers, "0 or more")


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
class TrainConfig:
    """Objective, optimizer and schedule."""

    total_samples: int
    """Samples to see; the schedule ends exactly there."""
    packs_per_step: int
    """Packs of one optimizer step, over all ranks; divisible by their number."""
    learning_rate: LearningRates
    """Base and target rates by group."""
    objective: Literal["ce_all", "ce_answer"] = "ce_all"
    """Cross-entropy on all text tokens, or on answers only."""
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
    weight_decay: float = 0.01
    """AdamW's; norms, biases, queries and layer-scales are excluded."""
    betas: tuple[float, ...] = (0.9, 0.999)
    """AdamW's."""
    eps: float = 1e-8
    """AdamW's."""
    clip: float = 1.0
    """Largest norm of the gradient; 0: no clipping."""
    freeze: tuple[Literal["connector", "dino", "llm"], ...] = ()
    """Groups that are not trained."""
    activation_checkpointing: bool = False
    """Recompute blocks in the backward pass: less memory, about a third more work."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 with fp32 master weights on a GPU, fp32 on a CPU."""
    seed: int = 42
    """Of the weights' initial values and of the data order."""
    eval_every: int = field(default=500, **_operational)
    """Steps between evaluations; 0: only at the end."""
    probe_every: int = field(default=50, **_operational)
    """Steps between probes of the coarse loss; 0: never."""
    checkpoint_every: int = field(default=500, **_operational)
    """Steps between checkpoints; 0: only at the end."""
    log_every: int = field(default=1, **_operational)
    """Steps between records."""

    def __post_init__(self) -> None:
        for name in ("total_samples", "packs_per_step", "log_every"):
            _require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "at least 1")
        for name in ("eval_every", "probe_every", "checkpoint_every", "clip", "weight_decay", "lambda_coarse"):
            _require(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "0 or more")
        _require(0 <= self.warmup < 1, "train.warmup", self.warmup, "a share of the run, at least 0 and below 1")
        iterations = self.fine_iterations
        _require(
            bool(iterations) and min(iterations) >= 1, "train.fine_iterations", iterations, "numbers of at least 1"
        )
        betas_fit = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        _require(betas_fit, "train.betas", self.betas, "two numbers in [0, 1)")
        _require(set(self.freeze) != set(GROUPS), "train.freeze", self.freeze, "at least one group left to train")
        coarse_loss_fits = self.lambda_coarse == 0 or self.mode == "coarse_fine"
        _require(coarse_loss_fits, "train.lambda_coarse", self.lambda_coarse, "0 unless train.mode = coarse_fine")
        for group in GROUPS:
            rate, key = getattr(self.learning_rate, group), f"train.learning_rate.{group}"
            _require(rate.base > 0, f"{key}.base", rate.base, "above 0; to freeze a group use train.freeze")
            converging = self.schedule == "converging"
            expected = "a rate with schedule: converging, else null"
            _require((rate.target is not None) == converging, f"{key}.target", rate.target, expected)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """What an evaluation during training measures on `data.val`; `train.eval_every` says when."""

    tasks: tuple[Literal["loss", "mc", "slots", "maps"], ...] = ("loss",)
    """Beside the losses: multiple choice; answers that list a word a frame; attention maps of fixed clips."""
    samples: int | None = None
    """Validation samples for the losses; null: all."""
    questions: int | None = None
    """Questions of each further task; null: all."""
    tokens: int = 8192
    """Rows of a validation pack."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WandbConfig:
    """Weights & Biases; the project is `foveated-vlm-{phase}`."""

    mode: Literal["online", "offline", "disabled"] = "offline"
    """`online` without a login falls back to `offline`, and says so."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """One run. Without a default: `name`, `data.train`, `train.total_samples`, `.packs_per_step`, `.learning_rate`."""

    name: str = field(**_operational)
    """Names the run; `runs/<name>` is its folder."""
    phase: str = field(default="train", **_operational)
    """Stage of the recipe, for the wandb project."""
    out: str | None = field(default=None, **_operational)
    """Folder that the run writes to; null: `runs/<name>`."""
    init_from: str | None = None
    """Weights to start from: a run's folder (its best checkpoint), a checkpoint, a model folder, or `hf:owner/name`."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The network."""
    data: DataConfig
    """The samples."""
    train: TrainConfig
    """The training."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig, **_operational)
    """Evaluation during training."""
    best_metric: dict[str, float] = field(default_factory=lambda: {"val_loss": -1.0})
    """Composite metric that chooses the best checkpoint: Σ weight × figure of the evaluation, larger is better."""
    wandb: WandbConfig = field(default_factory=WandbConfig, **_operational)
    """Where curves are sent."""

    def __post_init__(self) -> None:
        _require(bool(self.name) and "/" not in self.name, "name", self.name, "a name without slashes")
        known = [name for name in self.best_metric if name in FIGURES or "/" in name]
        expected = (
            f"weights of {', '.join(FIGURES)}, or of a figure such as val_loss/webvid or slots/coarse_fine/accuracy"
        )
        _require(bool(known) and len(known) == len(self.best_metric), "best_metric", self.best_metric, expected)
        multi_token = self.model.architecture == "multi_token"
        _require(not (multi_token and self.train.lambda_coarse), "train.lambda_coarse", self.train.lambda_coarse,
                 "0 with model.architecture = multi_token, which has no coarse pass")  # fmt: skip

    @property
    def folder(self) -> Path:
        """Where the run writes."""
        return Path(self.out) if self.out else Path("runs") / self.name

    @property
    def tokenizer(self) -> str:
        """Name for `fvlm.data.chat.load_tokenizer`."""
        return self.data.tokenizer or ("tiny" if self.model.preset == "tiny" else self.model.backbones[0])


def load_config(name: str, overrides: Sequence[str] = (), folder: Path | None = None) -> RunConfig:
    """The configuration `name` (a YAML file, or a bare name in `folder`) with `key=value` overrides applied.

    Raises ConfigError for a missing file, an unknown or missing key, a wrong type or a value that cannot be.
    """
    values = read_mapping(resolve(name, folder or REPOSITORY / "launch" / "configs", ".yaml"))
    for override in overrides:
        apply_override(values, override)
    return build(RunConfig, values)


def resolve(name: str, folder: Path, suffix: str) -> Path:
    """A path as given if it exists, else `folder/name[suffix]`; raises ConfigError that lists the known names."""
    bare = folder / (name if name.endswith(suffix) else name + suffix)
    for path in (Path(name), bare):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.stem for path in folder.glob(f"*{suffix}")))
    raise ConfigError(f"{name!r}: no such file, and none of the names in {folder}: {known}")


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Plain values, as YAML or JSON can hold them."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def save_config(config: RunConfig, path: Path) -> None:
    """Write the resolved configuration; `load_config(path)` gives the same one back."""
    path.write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")


def identity(config: RunConfig) -> dict[str, Any]:
    """Flat `key → value` of every field that the run's result depends on."""
    return _flatten(config, "")


def config_hash(config: RunConfig) -> str:
    """16 hex digits of `identity`: equal for runs that may continue one another."""
    return hashlib.sha256(json.dumps(identity(config), sort_keys=True).encode()).hexdigest()[:16]


def _flatten(config: Any, prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for f in fields(config):
        value = getattr(config, f.name)
        if f.metadata.get("operational"):
            continue
        flat |= _flatten(value, f"{prefix}{f.name}.") if is_dataclass(value) else {f"{prefix}{f.name}": value}
    return json.loads(json.dumps(flat))
