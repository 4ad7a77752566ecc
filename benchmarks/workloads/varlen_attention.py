"""Packed causal attention at SmolLM2's geometries.

Shapes: T rows, S samples of lengths L, h query and g key/value heads, k head width.

Necessary work: 4·h·k·Σ L(L+1)/2 operations forward and 2.5 times as many backward (scores again, dp, dv, dk, dq); bytes
forward q, K, V read, out and logsumexp written; backward q, K, V, out, its gradient and logsumexp read, dq, dK, dV
written. Bound by arithmetic.
"""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.workload import Contender, HostCall, Work, Workload, leaves, served_by
from fvlm.kernels.varlen_attention import varlen_attention
from fvlm.kernels.varlen_attention.flash import torch_varlen_attn


class Shape(NamedTuple):
    """A pack filled with samples of random lengths."""

    model: str
    heads: int
    kv_heads: int
    rows: int = 16384
    shortest: int = 64
    longest: int = 2048
    width: int = 64

    @property
    def name(self) -> str:
        """As rows and figures are named."""
        samples = f"samples of {self.shortest}-{self.longest}"
        return f"{self.heads}/{self.kv_heads} heads, {self.rows} tokens in {samples}, k={self.width}"


SHAPES = (Shape("135m", 9, 3), Shape("1.7B", 32, 32))
COMPILED = (*SHAPES, Shape("360m", 15, 5))
WIDE = Shape("other", 8, 8, width=128)
REHEARSED = (Shape("tiny", 2, 1, 40, 9, 20, 16), Shape("tiny", 2, 2, 40, 9, 20, 16))


class Inputs(NamedTuple):
    """q [T, h, k]; key, value [T, g, k]; cu_seqlens int32 [S+1] and the same on the host; upstream like q."""

    q: Tensor
    key: Tensor
    value: Tensor
    cu_seqlens: Tensor
    bounds: list[int]
    upstream: Tensor


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Unit normal tensors from a fixed seed; samples fill the pack, the last one is cut to fit."""
    lengths = torch.Generator().manual_seed(0)
    bounds = [0]
    while bounds[-1] < shape.rows:
        length = int(torch.randint(shape.shortest, shape.longest + 1, (), generator=lengths))
        bounds.append(min(bounds[-1] + length, shape.rows))
    torch.manual_seed(0)
    q, upstream = (torch.randn(shape.rows, shape.heads, shape.width, device=device).to(dtype) for _ in range(2))
    key, value = (torch.randn(shape.rows, shape.kv_heads, shape.width, device=device).to(dtype) for _ in range(2))
    return Inputs(q, key, value, torch.tensor(bounds, dtype=torch.int32, device=device), bounds, upstream)


def host_calls(dtype: torch.dtype, device: torch.device, rehearsed: bool = False) -> list[HostCall]:
    """Every size of SmolLM2, and heads twice as wide as theirs."""
    if rehearsed:
        return [host_call(shape, dtype, device) for shape in REHEARSED]
    wide = host_call(WIDE, dtype, device)._replace(trained=False)
    return [*(host_call(shape, dtype, device) for shape in COMPILED), wide]


def host_call(shape: Shape, dtype: torch.dtype, device: torch.device) -> HostCall:
    """The kernels' host functions."""
    from fvlm.kernels.varlen_attention import kernel

    x = inputs(shape, dtype, device)
    tensors = (x.q, x.key, x.value, x.cu_seqlens)
    return HostCall(
        "varlen_attention",
        f"{shape.heads}/{shape.kv_heads} heads, k={shape.width}",
        lambda: kernel.forward(*tensors),
        lambda results: kernel.backward(*tensors, *results, x.upstream),
    )


def workload(shape: Shape, dtype: torch.dtype, device: torch.device) -> Workload:
    """Triton, torch with and without its masks, FlashAttention if installed, SDPA over samples padded beforehand."""
    x = inputs(shape, dtype, device)

    def public(q: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return varlen_attention(q, key, value, x.cu_seqlens, shape.longest)

    backends = ["triton", "torch", *(["flash_attn"] if device.type == "cuda" and find_spec("flash_attn") else [])]
    contenders = [
        Contender(name, served_by(name, public), leaves(x.q, x.key, x.value), x.upstream) for name in backends
    ]
    if device.type == "cuda":  # this pack is full, so torch's function needs none of the back end's masks
        bare = partial(torch_varlen_attn, cu_seqlens=x.cu_seqlens, max_seqlen=shape.longest)
        contenders.append(Contender("torch's varlen_attn", bare, leaves(x.q, x.key, x.value), x.upstream))
    lengths = [end - start for start, end in pairwise(x.bounds)]
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    operations = 4 * shape.heads * shape.width * pairs
    lse_bytes = 4 * shape.heads * shape.rows
    once = 2 * x.q.nbytes + x.key.nbytes + x.value.nbytes + lse_bytes
    return Workload(
        name=f"varlen_attention {shape.name}",
        dtype=dtype,
        forward=Work(operations, once),
        backward=Work(2.5 * operations, 2 * once - lse_bytes),
        reference=lambda: _reference(x),
        contenders=[*contenders, _padded(x)],
    )


def _padded(x: Inputs) -> Contender:
    """SDPA over [S, h, L, k]: what training on padded batches would pay, its copies not counted."""
    longest = max(end - start for start, end in pairwise(x.bounds))
    samples = range(len(x.bounds) - 1)
    slots = torch.cat([s * longest + torch.arange(x.bounds[s + 1] - x.bounds[s]) for s in samples]).to(x.q.device)

    def pad(rows: Tensor) -> Tensor:
        padded = rows.new_zeros(len(samples) * longest, *rows.shape[1:]).index_copy(0, slots, rows)
        return padded.unflatten(0, (len(samples), longest)).transpose(1, 2)

    def sdpa(q: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, key, value, is_causal=True, enable_gqa=x.q.shape[1] != x.key.shape[1])

    padded = leaves(*(pad(rows).contiguous() for rows in (x.q, x.key, x.value)))
    return Contender(
        "sdpa, padded", sdpa, padded, pad(x.upstream), lambda y: y.transpose(1, 2).flatten(0, 1).index_select(0, slots)
    )


def _reference(x: Inputs) -> dict[str, Tensor]:
    """By the definition in float64, sample by sample."""
    group = x.q.shape[1] // x.key.shape[1]
    parts = []
    for start, end in pairwise(x.bounds):
        q, key, value = leaves(*(rows[start:end].double() for rows in (x.q, x.key, x.value)))
        scores = torch.einsum("ihk,jhk->hij", q, key.repeat_interleave(group, 1)) / q.shape[-1] ** 0.5
        future = torch.ones(end - start, end - start, dtype=torch.bool, device=q.device).triu(1)
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        out = torch.einsum("hij,jhk->ihk", weights, value.repeat_interleave(group, 1))
        gradients = torch.autograd.grad(out, (q, key, value), x.upstream[start:end].double())
        parts.append((out.detach(), *gradients))
    return dict(zip(("out", "d_q", "d_key", "d_value"), map(torch.cat, zip(*parts, strict=True)), strict=True))
