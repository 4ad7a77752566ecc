"""FlashAttention's packed form, from the package ``flash_attn`` or from torch itself.

Shapes: T rows, S samples, h heads, k head width.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import varlen

from .cpu import varlen_attention_cpu
from .reference import varlen_attention_padded

_TAKES_GROUPS = "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters  # torch 2.11's does not


def refuses_flash_attn(probe: Tensor, named: bool) -> str | None:
    """Why the package ``flash_attn`` cannot serve tensors like ``probe`` [T, h, k], or None."""
    if reason := _refuses_flash(probe):
        return reason
    if importlib.util.find_spec("flash_attn") is None:
        return "flash_attn is not installed"
    return None


def varlen_attention_flash(q: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """The package ``flash_attn``, with its deterministic gradients."""
    from flash_attn import flash_attn_varlen_func

    def attend(q: Tensor, key: Tensor, value: Tensor) -> Tensor:
        bounds = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
        return flash_attn_varlen_func(q, key, value, *bounds, causal=True, deterministic=True)

    return _without_tail(attend, q, key, value, cu_seqlens)


def varlen_attention_torch(q: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """torch's ``varlen_attn`` where it serves; its CPU attention sample by sample; otherwise one padded SDPA."""
    if q.device.type == "cpu":
        return varlen_attention_cpu(q, key, value, cu_seqlens)
    if _refuses_flash(q) or q.shape[2] % 8 != 0:
        return varlen_attention_padded(q, key, value, cu_seqlens, max_seqlen)
    return _without_tail(lambda *rows: torch_varlen_attn(*rows, cu_seqlens, max_seqlen), q, key, value, cu_seqlens)


def torch_varlen_attn(q: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """torch's function as it is: rows that belong to nobody are not written."""
    grouped = q.shape[1] != key.shape[1]
    if grouped and not _TAKES_GROUPS:
        key, value = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (key, value))
    options = {"enable_gqa": True} if grouped and _TAKES_GROUPS else {}
    bounds = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    return varlen.varlen_attn(q, key, value, *bounds, window_size=(-1, 0), **options)  # nothing ahead: causal


def _refuses_flash(probe: Tensor) -> str | None:
    if probe.device.type != "cuda":
        return "FlashAttention needs a GPU"
    if probe.dtype not in (torch.bfloat16, torch.float16):
        return f"FlashAttention takes bfloat16 and float16, not {str(probe.dtype).removeprefix('torch.')}"
    if probe.shape[2] > 256:
        return f"FlashAttention takes heads of up to 256, not {probe.shape[2]}"
    if torch.cuda.get_device_properties(probe.device).major < 8:  # unlike the capability, known to torch.compile
        return "FlashAttention needs compute capability 8.0"
    return None


def _without_tail(attend: Callable, q: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor) -> Tensor:
    """``attend``, with zeros in the rows that belong to nobody: it writes neither these outputs nor these gradients."""
    tail = (torch.arange(q.shape[0], device=q.device) >= cu_seqlens[-1]).view(-1, 1, 1)
    q, key, value = (x.masked_fill(tail, 0) for x in (q, key, value))  # and so their gradients
    return attend(q, key, value).masked_fill(tail, 0)
