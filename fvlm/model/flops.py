"""Necessary floating-point operations, by component, and the peak rates they are held against.

A multiply-add counts as two. Counted is what the mathematics needs: causal attention at half the square, no padding,
nothing twice, norms and other element-wise work left out (as in torch's ``FlopCounterMode``). The backward pass counts
twice the forward pass, as is the custom, whatever is frozen; blocks that it computes again are counted apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .base import spread
from .configuration import MODES, FoveatedConfig
from .flops_parameters import attention_widths, llm_matrices, vision_mlp_matrices

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
    """Forward operations by component, and what the backward pass computes again."""

    encoder: float
    """DINOv2 over distinct frames, the coarse query's row included."""
    queries: float
    """Written queries through the encoder's layers."""
    coarse_llm: float
    """Language model over the coarse sequence, all iterations, and the queries it writes."""
    fine_llm: float
    """Language model over whole samples."""
    head: float
    """Logits at loss positions."""
    recomputed: float = 0.0
    """Blocks that activation checkpointing runs a second time, of the language model's without their last product, of
    which nothing was saved; no part of the forward pass."""

    @property
    def forward(self) -> float:
        """All components."""
        return float(self.encoder + self.queries + self.coarse_llm + self.fine_llm + self.head)

    @property
    def training(self) -> float:
        """Forward and backward, each operation once: what MFU counts."""
        return 3 * self.forward

    @property
    def executed(self) -> float:
        """With the recomputed blocks: what HFU counts."""
        return self.training + self.recomputed


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What one sample, often a mean one, asks of the model."""

    frames: float
    """Distinct frames."""
    visual: float
    """Visual tokens."""
    tokens: float
    """All tokens, the visual ones too."""
    coarse: float
    """Of these, up to the last visual token."""
    labels: float
    """Loss positions."""

    @classmethod
    def video_first(
        cls, config: FoveatedConfig, *, frames: float, text_tokens: float, labels: float, looks: float = 1
    ) -> Sample:
        """Frames, then text, as the model lays them out; a frame is looked at `looks` times (8 for a still)."""
        if config.architecture == "multi_token":
            visual = frames * config.grid
        else:
            visual = frames * looks * config.tokens_per_frame
        return cls(frames=frames, visual=visual, tokens=visual + text_tokens, coarse=visual, labels=labels)


def flops_per_sample(
    config: FoveatedConfig,
    sample: Sample,
    *,
    mode: str = "coarse_fine",
    fine_iterations: Sequence[int] = (1,),
    replicated: bool = False,
    recompute: tuple[float, float] = (0.0, 0.0),
) -> Flops:
    """Operations of a sample.

    Args:
        config: geometry.
        sample: what it holds.
        mode: as for :func:`pack_flops`.
        fine_iterations: fine passes, taken in turn: their mean counts.
        replicated: a still that is looked at 8 times is encoded 8 times, as in a model without distinct frames.
        recompute: as for :func:`pack_flops`.
    """
    frames = sample.frames
    if replicated and config.architecture == "foveated":
        frames = sample.visual / config.tokens_per_frame
    return pack_flops(
        config,
        num_frames=frames,
        lengths=[sample.tokens],
        coarse_lengths=[sample.coarse],
        num_visual=sample.visual,
        num_labels=sample.labels,
        mode=mode,
        fine_iterations=sum(fine_iterations) / len(fine_iterations),
        recompute=recompute,
    )


def pack_flops(
    config: FoveatedConfig,
    *,
    num_frames: float,
    lengths: Sequence[float],
    coarse_lengths: Sequence[float],
    num_visual: float,
    num_labels: float,
    mode: str = "coarse_fine",
    fine_iterations: float = 1,
    recompute: tuple[float, float] = (0.0, 0.0),
) -> Flops:
    """Operations that a pack needs.

    Args:
        config: geometry.
        num_frames: distinct frames.
        lengths: rows of each sample.
        coarse_lengths: rows of each sample up to and with its last visual token.
        num_visual: visual tokens.
        num_labels: loss positions.
        mode: ``coarse_fine``, ``coarse_only`` or ``autoregressive``, which runs every row once, behind a cache; the
            multi-token baseline ignores it.
        fine_iterations: fine passes; the mean of several.
        recompute: shares of the encoder's and the language model's blocks that the backward pass runs again.

    Raises:
        ValueError: another mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: expected one of {', '.join(MODES)}")
    foveated, llm = config.architecture == "foveated", config.llm_config
    passes = fine_iterations if foveated and mode == "coarse_fine" else 0  # over the coarse sequence
    looks = num_visual * (1 if foveated and mode == "autoregressive" else passes)
    ends, blocks = _frame(config, coarse=foveated and mode != "autoregressive")
    layers, coarse_layer, fine_layer = llm.num_hidden_layers, _layer(llm, coarse_lengths), _layer(llm, lengths)
    rows = passes * sum(coarse_lengths) + sum(lengths)
    layer_again = passes * coarse_layer + fine_layer - 2 * rows * llm.hidden_size * llm.intermediate_size
    encoder_again, llm_again = (
        sum(cost for cost, chosen in zip(costs, spread(len(costs), share), strict=True) if chosen)
        for costs, share in zip((blocks, [layer_again] * layers), recompute, strict=True)
    )
    return Flops(
        encoder=num_frames * (ends + sum(blocks)),
        queries=looks * (_query(config) + _to_llm(config)),
        coarse_llm=passes * layers * coarse_layer + looks * 2 * llm.hidden_size * config.query_dim,
        fine_llm=layers * fine_layer,
        head=2.0 * num_labels * llm.hidden_size * llm.vocab_size,
        recomputed=num_frames * encoder_again + llm_again,
    )


def _frame(config: FoveatedConfig, coarse: bool) -> tuple[float, list[float]]:
    """One frame through DINOv2: what lies around the blocks, and each block; `coarse`: with the coarse query."""
    vision, keys = config.vision_config, _keys(config)
    width, num_blocks = vision.hidden_size, vision.num_hidden_layers
    embedding = 2 * (keys - 1) * width * vision.num_channels * vision.patch_size**2
    projected = 4 * keys * width**2  # K and V
    full = projected + _rows(vision, keys, keys)
    if config.architecture == "multi_token":  # pooled cells are projected
        return embedding + config.grid * (2 * width**2 + _to_llm(config)), [full] * num_blocks
    if not config.deep_query:  # looks into K and V of the final features
        return embedding + projected + coarse * (_query(config) + _to_llm(config)), [full] * num_blocks
    rider = coarse * _rows(vision, 1, keys)
    around = embedding + coarse * (2 * width**2 + _to_llm(config))
    return around, [full + rider] * (num_blocks - 1) + [projected + rider]  # nobody reads the last block's patches


def _keys(config: FoveatedConfig) -> int:
    return (config.image_size // config.patch_size) ** 2 + 1


def _rows(vision, rows: int, keys: int) -> float:
    """q, attention, o and MLP of ``rows`` rows over ``keys`` keys."""
    width = vision.hidden_size
    return rows * (4 * width**2 + 4 * keys * width + 2 * vision_mlp_matrices(vision))


def _query(config: FoveatedConfig) -> float:
    """One query through the layers, with its projections in and out."""
    vision, keys = config.vision_config, _keys(config)
    width = vision.hidden_size
    ends = 2 * config.query_dim * width + 2 * width**2
    if not config.deep_query:
        return 4 * keys * width + ends
    return vision.num_hidden_layers * _rows(vision, 1, keys) + ends


def _to_llm(config: FoveatedConfig) -> float:
    return 2 * config.vision_config.hidden_size * config.llm_config.hidden_size


def _layer(llm, lengths: Sequence[float]) -> float:
    """One of the language model's layers over samples of these lengths."""
    attended = sum(n * (n + 1) / 2 for n in lengths)
    return 2.0 * llm_matrices(llm) * sum(lengths) + 4.0 * attention_widths(llm)[0] * attended
