"""One micro-batch on the meta device: the memory that the code itself would take, in a second and without any.

The model, the kernels' host functions and autograd run as in training, on tensors that have shapes only; so what is
saved for the backward pass, what is recomputed and what is alive at the worst moment are counted, not estimated.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fvlm.data.capacities import Capacities
from fvlm.model import FoveatedConfig, PackedBatch, build_model
from fvlm.train.live_memory import LiveMemory
from fvlm.train.lora import add_adapters
from fvlm.train.optimizer import freeze as freeze_groups
from fvlm.train_config import CheckpointingConfig, LoraConfig

NO_CHECKPOINTING = CheckpointingConfig()


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """Bytes of one micro-batch beside weights, optimizer and engine."""

    activations: int
    """Alive when the forward pass is done: what the backward pass waits for, the pack included."""
    peak: dict[str, int]
    """By category at the worst moment: `pack`, `activations`, `temporaries` (gradients of activations, recomputed
    blocks), `kernels` and `logits` (scratch of the kernels), `gradients` of parameters."""
    num_ops: int
    """Operations of forward and backward, about as many kernel launches."""

    @property
    def total(self) -> int:
        """Bytes at the worst moment."""
        return sum(self.peak.values())


def meta_model(
    geometry: FoveatedConfig, dtype: torch.dtype, freeze: tuple[str, ...] = (), lora: LoraConfig | None = None
) -> nn.Module:
    """The model without memory, in training mode, with parameter groups frozen, and adapters."""
    with torch.device("meta"):
        model = build_model(geometry)
        freeze_groups(model, freeze)
        if lora is not None:
            add_adapters(model, lora, seed=0)
    return model.to(dtype).train()


def meta_pack(geometry: FoveatedConfig, capacities: Capacities) -> PackedBatch:
    """A pack of these capacities; which of its rows are used changes no shape."""
    size = geometry.image_size

    def empty(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    tokens, visual, samples = capacities.tokens, capacities.visual, capacities.samples
    return PackedBatch(
        frames=empty(capacities.frames, 3, size, size, dtype=torch.uint8),
        token_ids=empty(tokens),
        position_ids=empty(tokens),
        cu_seqlens=empty(samples + 1, dtype=torch.int32),
        loss_index=empty(capacities.labels),
        labels=empty(capacities.labels),
        visual_index=empty(visual),
        visual_frame=empty(visual),
        query_from=empty(visual),
        coarse_index=empty(capacities.coarse),
        coarse_cu_seqlens=empty(samples + 1, dtype=torch.int32),
        source_id=empty(samples),
        max_seqlen=capacities.max_seqlen,
        visual_cell=empty(visual) if geometry.architecture == "multi_token" else None,
    )


def dry_run(
    geometry: FoveatedConfig,
    capacities: Capacities,
    *,
    checkpointing: CheckpointingConfig = NO_CHECKPOINTING,
    dtype: torch.dtype = torch.bfloat16,
    keep_gradients: bool = True,
    freeze: tuple[str, ...] = (),
    lora: LoraConfig | None = None,
    backend: str = "triton",
    **call: Any,
) -> DryRun:
    """Forward and backward of one pack.

    Args:
        geometry: the model's.
        capacities: the pack's.
        checkpointing: which blocks are recomputed.
        dtype: of the weights.
        keep_gradients: parameters' gradients stay (ZeRO-0 and 1); else each leaves as soon as it is complete.
        freeze: parameter groups that are not trained.
        lora: adapters instead of the language model's own weights.
        backend: who serves the ops: `triton` as on a GPU, or `torch`, which saves other tensors (docs/memory.md).
        call: arguments of the model's call, as `fvlm.train.objectives.call_arguments` gives them.
    """
    model = meta_model(geometry, dtype, freeze, lora)
    if checkpointing != NO_CHECKPOINTING:
        model.gradient_checkpointing_enable(encoder=checkpointing.encoder, llm=checkpointing.llm)
    memory = LiveMemory()
    memory.category = "weights"
    for tensor in (*model.parameters(), *model.buffers()):  # counted apart: `fvlm.train.memory`
        memory.count(tensor)
    weights = memory.live.total()
    with memory:
        memory.category = "pack"
        batch = meta_pack(geometry, capacities)
    _sort_gradients(model, memory, keep_gradients)
    memory.category = "activations"
    with _served_by(backend), _gpu_attention(), memory:
        out = model(batch=batch, **call)
        loss = out.loss_sum if out.coarse_loss_sum is None else out.loss_sum + out.coarse_loss_sum
        activations = memory.live.total() - weights
        memory.category = "temporaries"
        loss.backward()
    peak = {name: size for name, size in memory.peak.items() if size and name != "weights"}
    return DryRun(activations=activations, peak=peak, num_ops=memory.num_ops)


def _sort_gradients(model: nn.Module, memory: LiveMemory, keep: bool) -> None:
    """Count parameters' gradients as such, or let them go where an engine would have taken them over."""

    def accumulated(parameter: nn.Parameter) -> None:
        if keep:
            memory.recategorise(parameter.grad, "gradients")
        else:
            parameter.grad = None

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(accumulated)


@contextmanager
def _served_by(backend: str) -> Iterator[None]:
    before = os.environ.get("FVLM_KERNELS")
    os.environ["FVLM_KERNELS"] = backend
    try:
        yield
    finally:
        if before is None:
            del os.environ["FVLM_KERNELS"]
        else:
            os.environ["FVLM_KERNELS"] = before


@contextmanager
def _gpu_attention() -> Iterator[None]:
    """DINOv2's attention as FlashAttention serves it on a GPU; on the meta device torch would spell it out.

    torch has modes for such replacements, but they are off in the backward pass, where blocks are recomputed.
    """

    def flash(query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False) -> Tensor:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal)[0]

    before, F.scaled_dot_product_attention = F.scaled_dot_product_attention, flash
    try:
        yield
    finally:
        F.scaled_dot_product_attention = before
