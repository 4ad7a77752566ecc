"""Necessary floating-point operations of a pack, by component, and the peak rates they are held against.

A multiply-add counts as two. Counted is what the mathematics needs: causal attention at half the square, no padding, no
recomputation, norms and other element-wise work left out (as in torch's ``FlopCounterMode``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from .configuration import FoveatedConfig

# dense bf16 with fp32 accumulation, operations a second, from the vendors' data sheets
PEAK_FLOPS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "RTX 5090": 209.5e12,
}


def peak_flops(device_name: str) -> float | None:
    """Peak bf16 rate of a GPU by the name that CUDA reports; None for one that is not in the table."""
    for name in sorted(PEAK_FLOPS, key=len, reverse=True):
        if all(word in device_name for word in name.split()):
            return PEAK_FLOPS[name]
    return None


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Forward operations by component."""

    encoder: float
    """DINOv2 over distinct frames, the coarse query's row included."""
    queries: float
    """Fine queries through the encoder's layers."""
    coarse_llm: float
    """Language model over the coarse sequence, all iterations, and the queries it writes."""
    fine_llm: float
    """Language model over whole samples."""
    head: float
    """Logits at loss positions."""

    @property
    def forward(self) -> float:
        """All components."""
        return float(sum(asdict(self).values()))

    @property
    def training(self) -> float:
        """Forward and backward: the backward pass takes twice the forward's operations."""
        return 3 * self.forward


def pack_flops(
    config: FoveatedConfig,
    *,
    num_frames: int,
    lengths: Sequence[int],
    coarse_lengths: Sequence[int],
    num_visual: int,
    num_labels: int,
    mode: str = "coarse_fine",
    fine_iterations: int = 1,
) -> Flops:
    """Operations that a pack needs.

    Args:
        config: geometry.
        num_frames: distinct frames.
        lengths: rows of each sample.
        coarse_lengths: rows of each sample up to and with its last visual token.
        num_visual: visual tokens.
        num_labels: loss positions.
        mode: ``coarse_fine`` or ``coarse_only`` (the multi-token baseline ignores it).
        fine_iterations: fine passes.
    """
    looks = config.architecture == "foveated"
    fine = looks and mode == "coarse_fine"
    llm, vision = config.llm_config, config.vision_config
    to_llm = 2 * vision.hidden_size * llm.hidden_size
    to_query = 2 * llm.hidden_size * config.query_dim
    iterations = fine_iterations if fine else 0
    coarse_tokens = num_frames if looks else num_frames * config.grid
    return Flops(
        encoder=num_frames * _frame(config, rider=looks) + coarse_tokens * to_llm,
        queries=iterations * num_visual * (_query(config) + to_llm),
        coarse_llm=iterations * (_llm(llm, coarse_lengths) + num_visual * to_query),
        fine_llm=_llm(llm, lengths),
        head=2.0 * num_labels * llm.hidden_size * llm.vocab_size,
    )


def _frame(config: FoveatedConfig, rider: bool) -> float:
    """One frame through DINOv2; ``rider``: with the coarse query as one more row (deep) or afterwards (shallow)."""
    vision = config.vision_config
    width, layers = vision.hidden_size, vision.num_hidden_layers
    patches = (config.image_size // config.patch_size) ** 2
    keys = patches + 1
    embedding = 2 * patches * width * 3 * vision.patch_size**2
    deep = rider and config.deep_query
    full_layers = layers - 1 if deep else layers
    body = full_layers * _block(vision, keys + deep, keys)
    if deep:  # of the last layer only K, V and the rider are needed
        return embedding + body + 4 * keys * width**2 + _rows(vision, 1, keys) + 2 * width**2
    if rider:
        return embedding + body + 4 * keys * width**2 + _query(config)
    return embedding + body + 2 * config.grid * width**2  # the multi-token baseline projects pooled cells


def _block(vision, rows: int, keys: int) -> float:
    return 4 * keys * vision.hidden_size**2 + _rows(vision, rows, keys)


def _rows(vision, rows: int, keys: int) -> float:
    """q, attention, o and MLP of ``rows`` rows over ``keys`` keys."""
    width = vision.hidden_size
    return rows * (4 * width**2 + 4 * keys * width + 4 * vision.mlp_ratio * width**2)


def _query(config: FoveatedConfig) -> float:
    """One fine query through the layers."""
    vision = config.vision_config
    keys = (config.image_size // config.patch_size) ** 2 + 1
    if not config.deep_query:
        return 4 * keys * vision.hidden_size + _ends(config)
    return vision.num_hidden_layers * _rows(vision, 1, keys) + _ends(config)


def _ends(config: FoveatedConfig) -> float:
    width = config.vision_config.hidden_size
    return 2 * config.query_dim * width + 2 * width**2


def _llm(llm, lengths: Sequence[int]) -> float:
    head_dim = getattr(llm, "head_dim", None) or llm.hidden_size // llm.num_attention_heads
    q_width, kv_width = llm.num_attention_heads * head_dim, llm.num_key_value_heads * head_dim
    weights = llm.hidden_size * (2 * q_width + 2 * kv_width + 3 * llm.intermediate_size)
    attended = sum(n * (n + 1) / 2 for n in lengths)
    return llm.num_hidden_layers * (2.0 * weights * sum(lengths) + 4.0 * q_width * attended)
