"""Parameters of a model by component, from its configuration alone; operations follow from the same matrices."""

from __future__ import annotations

from dataclasses import dataclass

from .configuration import FoveatedConfig


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Elements by component; of a tied head once, with the embeddings."""

    vision_embedding: int
    """DINOv2's patch projection, CLS and mask token, position table."""
    vision_blocks: int
    """Its blocks and final norm."""
    connector: int
    """Queries, the projections around them, and what takes a frame into the language model."""
    llm_embedding: int
    """Token embeddings, and the head where it is not tied to them."""
    llm_blocks: int
    """The language model's layers and final norm."""

    @property
    def vision(self) -> int:
        """DINOv2."""
        return self.vision_embedding + self.vision_blocks

    @property
    def llm(self) -> int:
        """The language model."""
        return self.llm_embedding + self.llm_blocks

    @property
    def total(self) -> int:
        """All of them."""
        return self.vision + self.connector + self.llm


def parameter_count(config: FoveatedConfig) -> ParameterCount:
    """Elements of the model that `fvlm.model.build_model` makes of a configuration."""
    vision, llm = config.vision_config, config.llm_config
    width, wide = vision.hidden_size, llm.hidden_size
    table = (vision.image_size // vision.patch_size) ** 2 + 1
    patches = width * vision.num_channels * vision.patch_size**2 + width
    heads = 1 if llm.tie_word_embeddings else 2
    return ParameterCount(
        vision_embedding=patches + width * (table + 1 + bool(vision.use_mask_token)),
        vision_blocks=vision.num_hidden_layers * _vision_block(vision) + 2 * width,
        connector=_connector(config, width, wide),
        llm_embedding=heads * llm.vocab_size * wide,
        llm_blocks=llm.num_hidden_layers * _llm_layer(llm) + wide,
    )


def vision_mlp_matrices(vision) -> int:
    """Elements of the matrices of a DINOv2 block's MLP."""
    inner = int(vision.hidden_size * vision.mlp_ratio)
    if vision.use_swiglu_ffn:  # gate, up and down, two thirds as wide
        return 3 * vision.hidden_size * _swiglu_width(inner)
    return 2 * vision.hidden_size * inner


def llm_matrices(llm) -> int:
    """Elements of the matrices of one of the language model's layers."""
    q_width, kv_width = attention_widths(llm)
    return llm.hidden_size * (2 * q_width + 2 * kv_width + 3 * llm.intermediate_size)


def attention_widths(llm) -> tuple[int, int]:
    """All query heads together, and all key heads."""
    head_dim = getattr(llm, "head_dim", None) or llm.hidden_size // llm.num_attention_heads
    return llm.num_attention_heads * head_dim, llm.num_key_value_heads * head_dim


def _swiglu_width(inner: int) -> int:
    return (int(inner * 2 / 3) + 7) // 8 * 8


def _vision_block(vision) -> int:
    width, inner = vision.hidden_size, int(vision.hidden_size * vision.mlp_ratio)
    biases = width + 3 * width * bool(vision.qkv_bias)  # of o; of q, k and v
    mlp_biases = width + (2 * _swiglu_width(inner) if vision.use_swiglu_ffn else inner)
    norms_and_scales = 4 * width + 2 * width
    return 4 * width**2 + biases + vision_mlp_matrices(vision) + mlp_biases + norms_and_scales


def _llm_layer(llm) -> int:
    q_width, kv_width = attention_widths(llm)
    attention_biases = (q_width + 2 * kv_width + llm.hidden_size) * bool(llm.attention_bias)
    mlp_biases = (2 * llm.intermediate_size + llm.hidden_size) * bool(llm.mlp_bias)
    return llm_matrices(llm) + attention_biases + mlp_biases + 2 * llm.hidden_size


def _connector(config: FoveatedConfig, width: int, wide: int) -> int:
    both = width**2 + width + width * wide + wide  # output_proj, dino_to_llm
    temperature = int(config.query_logit_scale == "learnable")
    if config.architecture == "multi_token":
        return both + temperature
    query = config.query_dim
    return both + temperature + 2 * query + query * width + wide * query + query  # q_static, q_init, in, llm_to_query
