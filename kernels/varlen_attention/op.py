"""Public entry of packed causal attention: validate, choose a back end, call it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import Backend, debug_checks, require, select, under_autocast
from ..launching import refuses_triton
from .flash import refuses_flash_attn, varlen_attention_flash, varlen_attention_torch
from .reference import varlen_attention_reference

WIDEST = 128
"""The widest head that the Triton kernels' tiles have room for."""


@torch.library.custom_op("fvlm::varlen_attention", mutates_args=())
def _forward(q: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    from .kernel import forward

    return forward(q, key, value, cu_seqlens)


@_forward.register_fake
def _(q, key, value, cu_seqlens):
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.custom_op("fvlm::varlen_attention_backward", mutates_args=())
def _backward(
    q: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, out: Tensor, lse: Tensor, d_out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from .kernel import backward

    return backward(q, key, value, cu_seqlens, out, lse, d_out)


@_backward.register_fake
def _(q, key, value, *_):
    return q.new_empty(q.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output)


def _gradients(ctx, d_out, d_lse):
    return *torch.ops.fvlm.varlen_attention_backward(*ctx.saved_tensors, d_out), None


_forward.register_autograd(_gradients, setup_context=_setup_context)


def varlen_attention_triton(q: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """The Triton kernels (``kernel.py``); they need no bound of the lengths."""
    return torch.ops.fvlm.varlen_attention(q, key, value, cu_seqlens)[0]


def _refuses_triton(probe: Tensor, named: bool) -> str | None:
    if probe.shape[2] > WIDEST:
        return f"the kernels take heads of up to {WIDEST}, not {probe.shape[2]}"
    return refuses_triton(probe, named)


_BACKENDS = (
    Backend("triton", varlen_attention_triton, _refuses_triton),
    Backend("flash_attn", varlen_attention_flash, refuses_flash_attn),
    Backend("torch", varlen_attention_torch),
    Backend("reference", varlen_attention_reference),
)


def varlen_attention(q: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """Causal attention inside each packed sample, with grouped key/value heads, scaled by 1/√k.

    Args:
        q: [T, h, k].
        key, value: [T, h_kv, k] with h a multiple of h_kv, same dtype as ``q``.
        cu_seqlens: int32 [S+1]; sample s owns rows cu_seqlens[s]:cu_seqlens[s+1]; a fixed length is filled up by
            repeating the last bound. Rows beyond it belong to nobody and come out zero.
        max_seqlen: an upper bound of the samples' lengths.

    Returns:
        [T, h, k] in q's dtype.

    Raises:
        ValueError: shapes or dtypes that do not fit; under ``FVLM_DEBUG=1`` also bounds that do not start at 0,
            decrease, leave T or exceed ``max_seqlen``.
    """
    op = "varlen_attention"
    require(q.ndim == 3 and len(q) > 0, op, "q", "[T, h, k] with at least one row", tuple(q.shape))
    fits = key.ndim == 3 and key.shape[0] == q.shape[0] and key.shape[2] == q.shape[2]
    fits = fits and key.shape[1] > 0 and q.shape[1] % key.shape[1] == 0
    require(fits, op, "key", f"[{q.shape[0]}, h_kv dividing {q.shape[1]}, {q.shape[2]}]", tuple(key.shape))
    require(value.shape == key.shape, op, "value", f"key's shape {tuple(key.shape)}", tuple(value.shape))
    q, key, value = under_autocast(q, key, value)
    require(key.dtype == q.dtype == value.dtype, op, "key and value", f"{q.dtype} as q", (key.dtype, value.dtype))
    require(cu_seqlens.ndim == 1 and cu_seqlens.numel() >= 1, op, "cu_seqlens", "[S+1]", tuple(cu_seqlens.shape))
    require(cu_seqlens.dtype == torch.int32, op, "cu_seqlens", "int32", cu_seqlens.dtype)
    for name, x in (("key", key), ("value", value), ("cu_seqlens", cu_seqlens)):
        require(x.device == q.device, op, name, f"on {q.device} as q", x.device)
    require(max_seqlen >= 1, op, "max_seqlen", "at least 1", max_seqlen)
    if cu_seqlens.numel() == 1:
        cu_seqlens = cu_seqlens.repeat(2)  # no sample is one sample of no rows, which every back end can take
    if debug_checks():
        lengths = cu_seqlens.diff()
        sound = int(cu_seqlens[0]) == 0 and bool((lengths >= 0).all()) and int(cu_seqlens[-1]) <= q.shape[0]
        require(sound, op, "cu_seqlens", f"rising from 0 to at most {q.shape[0]}", cu_seqlens.tolist())
        require(int(lengths.max()) <= max_seqlen, op, "max_seqlen", f"at least {int(lengths.max())}", max_seqlen)
    return select(op, _BACKENDS, q)(q, key, value, cu_seqlens, max_seqlen)
