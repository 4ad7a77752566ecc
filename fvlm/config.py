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

from fvlm.data.mixture import MixtureConfig, name_base, read_base
from fvlm.schema import OPERATIONAL, apply_override, build, read_mapping, require, resolve
from fvlm.train_config import TrainConfig

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIGS = REPOSITORY / "launch" / "configs"
FIGURES = ("val_loss", "loss_fine", "loss_coarse", "loss_ratio", "attention_entropy")
SMOLLM = "HuggingFaceTB/SmolLM2-{}-Instruct"
BACKBONES = {
    "135m": (SMOLLM.format("135M"), "facebook/dinov2-small"),
    "360m": (SMOLLM.format("360M"), "facebook/dinov2-small"),
    "1b7": (SMOLLM.format("1.7B"), "facebook/dinov2-small"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Which network; `llm` and `vision` replace the preset's back bones."""

    preset: Literal["tiny_s", "tiny", "tiny_l", "135m", "360m", "1b7"] = "tiny"
    """Pair of back bones (README); the tiny ones, of three sizes, are built locally with random weights."""
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
        if self.is_tiny:
            given = {"model.llm": self.llm, "model.vision": self.vision}
            for key, value in given.items():
                require(value is None, key, value, f"null with model.preset = {self.preset}; choose 135m, 360m or 1b7")
        require(self.tokens_per_frame >= 1, "model.tokens_per_frame", self.tokens_per_frame, "at least 1")
        size = self.image_size
        require(size is None or (size > 0 and size % 14 == 0), "model.image_size", size, "a multiple of the patch, 14")

    @property
    def is_tiny(self) -> bool:
        """Whether it is built locally, with the tokenizer's vocabulary."""
        return self.preset not in BACKBONES

    @property
    def frame_size(self) -> int:
        """Side of a frame in pixels."""
        return self.image_size or (56 if self.is_tiny else 224)

    @property
    def backbones(self) -> tuple[str, str]:
        """(language model, vision model); not for the tiny ones."""
        llm, vision = BACKBONES[self.preset]
        return self.llm or llm, self.vision or vision

    @property
    def overrides(self) -> dict[str, Any]:
        """Fields that the model's own configuration takes by the same names."""
        names = ("architecture", "tokens_per_frame", "grid", "visual_scale", "deep_query", "query_logit_scale")
        return {name: getattr(self, name) for name in (*names, "random_queries")} | {"image_size": self.frame_size}


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Shards and how they become packs."""

    train: tuple[str, ...]
    """Shard files, folders, globs or lists (docs/data.md); relative to the working directory, or URLs."""
    val: tuple[str, ...] = ()
    """Shard files, folders or globs of the fixed validation set, on this machine; none: no evaluation."""
    tokenizer: str | None = None
    """`tiny`, a Hugging Face id or a folder; null: the language model's own."""
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    """Mixture of the training samples: name or file of one (`launch/configs/mixtures`), or keys, on top of a `base`."""
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
    num_workers: int = field(default=2, **OPERATIONAL)
    """Reading processes of each rank; 0 reads in the training process."""
    cache_dir: str | None = field(default=None, **OPERATIONAL)
    """Folder for copies of remote shards, and for indexes of shards that come without one; null: both are an error."""
    cache_gb: float = field(default=100.0, **OPERATIONAL)
    """GB (1e9 bytes) of remote shards kept there; the least recently used ones go."""

    def __post_init__(self) -> None:
        require(len(self.train) > 0, "data.train", self.train, "at least one shard file, folder or glob")
        for name in ("tokens", "frames", "longest", "window"):
            value = getattr(self, name)
            require(value in ("auto", None) or value >= 1, f"data.{name}", value, "at least 1")
        require(self.cache_gb > 0, "data.cache_gb", self.cache_gb, "more than 0")
        require(self.num_workers >= 0, "data.num_workers", self.num_workers, "0 or more")


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

    name: str = field(**OPERATIONAL)
    """Names the run; `runs/<name>` is its folder."""
    phase: str = field(default="train", **OPERATIONAL)
    """Stage of the recipe, for the wandb project."""
    out: str | None = field(default=None, **OPERATIONAL)
    """Folder that the run writes to; null: `runs/<name>`."""
    init_from: str | None = None
    """Weights to start from: a run's folder (its best checkpoint), a checkpoint, a model folder, or `hf:owner/name`."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The network."""
    data: DataConfig
    """The samples."""
    train: TrainConfig
    """The training."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig, **OPERATIONAL)
    """Evaluation during training."""
    best_metric: dict[str, float] = field(default_factory=lambda: {"val_loss": -1.0})
    """Composite metric that chooses the best checkpoint: Σ weight × figure of the evaluation, larger is better."""
    wandb: WandbConfig = field(default_factory=WandbConfig, **OPERATIONAL)
    """Where curves are sent."""
    price_per_gpu_hour: float | None = field(default=None, **OPERATIONAL)
    """Money for one device for an hour, for the cost in `run_summary.json` and the report; null: hours only."""

    def __post_init__(self) -> None:
        require(bool(self.name) and "/" not in self.name, "name", self.name, "a name without slashes")
        known = [name for name in self.best_metric if name in FIGURES or "/" in name]
        expected = (
            f"weights of {', '.join(FIGURES)}, or of a figure such as val_loss/webvid or slots/coarse_fine/accuracy"
        )
        require(bool(known) and len(known) == len(self.best_metric), "best_metric", self.best_metric, expected)
        price = self.price_per_gpu_hour
        require(price is None or price >= 0, "price_per_gpu_hour", price, "0 or more")
        multi_token = self.model.architecture == "multi_token"
        require(not (multi_token and self.train.lambda_coarse), "train.lambda_coarse", self.train.lambda_coarse,
                 "0 with model.architecture = multi_token, which has no coarse pass")  # fmt: skip
        if self.train.objective == "dpo":
            self._require_preferences()

    def _require_preferences(self) -> None:
        """The reference judges an answer once, so it has to be asked in one way only."""
        mixture, train, model = self.data.mixture, self.train, self.model
        how = "with train.objective = dpo"
        require(train.dpo_beta > 0, "train.dpo_beta", train.dpo_beta, "above 0")
        require(train.lambda_coarse == 0, "train.lambda_coarse", train.lambda_coarse, f"0 {how}")
        one = len(train.fine_iterations) == 1
        require(one, "train.fine_iterations", train.fine_iterations, f"one number {how}")
        share = mixture.question_first
        require(share in (0, 1), "data.mixture.question_first", share, f"0 or 1 {how}")
        require(mixture.narrated == 0, "data.mixture.narrated", mixture.narrated, f"0 {how}")
        require(not model.random_queries, "model.random_queries", model.random_queries, f"false {how}")

    @property
    def folder(self) -> Path:
        """Where the run writes."""
        return Path(self.out) if self.out else Path("runs") / self.name

    @property
    def tokenizer(self) -> str:
        """Name for `fvlm.data.chat.load_tokenizer`."""
        return self.data.tokenizer or ("tiny" if self.model.is_tiny else self.model.backbones[0])


def load_config(name: str, overrides: Sequence[str] = (), folder: Path | None = None) -> RunConfig:
    """The configuration `name` (a YAML file, or a bare name in `folder`) with `key=value` overrides applied.

    Raises ConfigError for a missing file, an unknown or missing key, a wrong type or a value that cannot be.
    """
    folder = folder or CONFIGS
    return _resolved(read_mapping(resolve(name, folder, ".yaml")), overrides, folder)


def override_config(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """`config` with `key=value` overrides applied; raises ConfigError as `load_config` does."""
    return _resolved(to_dict(config), overrides, CONFIGS)


def _resolved(values: dict[str, Any], overrides: Sequence[str], folder: Path) -> RunConfig:
    """Overrides in order, then the mixture's base read, then typed."""
    name_base(values.get("data"))
    for override in overrides:
        apply_override(values, override)
        name_base(values.get("data"))
    read_base(values.get("data"), folder / "mixtures")
    return build(RunConfig, values)


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
    return json.loads(json.dumps(flat, default=dataclasses.asdict))
