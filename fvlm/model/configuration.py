"""Geometry of a foveated (or multi-token) vision-language model."""

from __future__ import annotations

from transformers import Dinov2Config, LlamaConfig, PreTrainedConfig

ARCHITECTURES = ("foveated", "multi_token")
MODES = ("coarse_only", "coarse_fine", "autoregressive")
"""How a frame is looked at, in the order of tables and figures; docs/model.md."""


class FoveatedConfig(PreTrainedConfig):
    """Configuration of :class:`FoveatedVLM` and :class:`MultiTokenVLM`; the names follow docs/model.md.

    Args:
        llm_config, vision_config: Llama and DINOv2 configurations, as objects or dictionaries.
        query_dim: width of a query; the DINOv2 width unless given.
        visual_scale: factor on every visual token.
        deep_query: the query passes every DINOv2 block; False = one attention over the final features (ablation).
        query_logit_scale: factor on the query's attention logits (2 = temperature 0.5), or ``"learnable"``, from 1 on.
        tokens_per_frame: looks at each video frame (data layout; no parameters depend on it).
        random_queries: control experiment: fine queries are drawn N(0, 1), not written by the language model.
        architecture: ``"foveated"`` or ``"multi_token"``.
        grid: cells a frame of the multi-token baseline: 1, 4 or 16.
        image_size: side of the frames in pixels; 224 unless given, or the position table's size if smaller.
        default_mode: how ``generate`` looks where nobody says: as its run trained, or as deployed.
        fine_iterations: fine passes of ``coarse_fine`` where nobody says.

    Raises:
        ValueError: a value outside of the above, naming the key.
    """

    model_type = "fvlm"

    def __init__(
        self,
        llm_config: LlamaConfig | dict | None = None,
        vision_config: Dinov2Config | dict | None = None,
        query_dim: int | None = None,
        visual_scale: float = 0.14,
        deep_query: bool = True,
        query_logit_scale: float | str = 1.0,
        tokens_per_frame: int = 1,
        random_queries: bool = False,
        architecture: str = "foveated",
        grid: int = 4,
        image_size: int | None = None,
        default_mode: str = "autoregressive",
        fine_iterations: int = 1,
        **kwargs,
    ):
        self.llm_config = _as_config(llm_config, LlamaConfig)
        self.vision_config = _as_config(vision_config, Dinov2Config)
        self.query_dim = query_dim or self.vision_config.hidden_size
        self.visual_scale = visual_scale
        self.deep_query = deep_query
        self.query_logit_scale = query_logit_scale
        self.tokens_per_frame = tokens_per_frame
        self.random_queries = random_queries
        self.architecture = architecture
        self.grid = grid
        self.image_size = image_size or min(self.vision_config.image_size, 224)
        self.default_mode = default_mode
        self.fine_iterations = fine_iterations
        _require(architecture in ARCHITECTURES, "architecture", f"one of {ARCHITECTURES}", architecture)
        _require(grid in (1, 4, 16), "grid", "1, 4 or 16", grid)
        _require(tokens_per_frame >= 1, "tokens_per_frame", "at least 1", tokens_per_frame)
        _require(default_mode in MODES, "default_mode", f"one of {MODES}", default_mode)
        _require(fine_iterations >= 1, "fine_iterations", "at least 1", fine_iterations)
        learnable = query_logit_scale == "learnable"
        number = isinstance(query_logit_scale, (int, float)) and query_logit_scale > 0
        _require(learnable or number, "query_logit_scale", "a positive number or 'learnable'", query_logit_scale)
        whole = self.image_size % self.patch_size == 0
        _require(whole, "image_size", f"a multiple of the patch, {self.patch_size}", self.image_size)
        kwargs.setdefault("tie_word_embeddings", self.llm_config.tie_word_embeddings)
        super().__init__(**kwargs)

    @property
    def patch_size(self) -> int:
        """Patch side in pixels."""
        return self.vision_config.patch_size


def _as_config(value, config_class):
    if value is None:
        return config_class()
    return config_class(**value) if isinstance(value, dict) else value


def _require(condition: bool, key: str, expected: str, got: object) -> None:
    if not condition:
        raise ValueError(f"{key}: expected {expected}, got {got!r}")


def tiny_config(vocab_size: int, size: str = "tiny", **overrides) -> FoveatedConfig:
    """About 1.5 M parameters on 56-pixel frames (4×4 patches): the model of the tests and the demo.

    Args:
        vocab_size: the tokenizer's.
        size: one of :data:`TINY`: the language model is wider or narrower, for scaling on a small scale.
        overrides: further fields of :class:`FoveatedConfig`.

    Raises:
        ValueError: another size.
    """
    _require(size in TINY, "size", f"one of {', '.join(TINY)}", size)
    heads = TINY[size]
    llm_config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32 * heads,
        intermediate_size=96 * heads,
        num_hidden_layers=4,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        initializer_range=0.02,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    vision_config = Dinov2Config(
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=3,
        mlp_ratio=4,
        image_size=56,
        patch_size=14,
        initializer_range=0.12,
    )
    return FoveatedConfig(llm_config=llm_config, vision_config=vision_config, **overrides)


def preset_config(preset: str, **overrides) -> FoveatedConfig:
    """The geometry of ``135m``, ``360m`` or ``1b7`` as published, for work that needs no weights, such as planning.

    Args:
        preset: one of :data:`PRESETS`.
        overrides: further fields of :class:`FoveatedConfig`.

    Raises:
        ValueError: another preset.
    """
    _require(preset in PRESETS, "preset", f"one of {', '.join(PRESETS)}", preset)
    width, inner, layers, heads, kv_heads, theta = PRESETS[preset]
    llm_config = LlamaConfig(
        vocab_size=49152,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    vision_config = Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        mlp_ratio=4,
        image_size=518,
        patch_size=14,
    )
    return FoveatedConfig(llm_config=llm_config, vision_config=vision_config, **overrides)


# heads of the language model, 32 wide each
TINY = {"tiny_s": 2, "tiny": 4, "tiny_l": 6}
# SmolLM2-Instruct's config.json: width, MLP width, layers, heads, key/value heads, rope θ
PRESETS = {
    "135m": (576, 1536, 30, 9, 3, 100_000.0),
    "360m": (960, 2560, 32, 15, 5, 100_000.0),
    "1b7": (2048, 8192, 24, 32, 32, 130_000.0),
}
