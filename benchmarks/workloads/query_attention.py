"""Query attention and the encoder's own attention at DINOv2-small's geometry.

Shapes: F frames, N keys a frame, V queries, h heads, k head width, e bytes an element.

Necessary work of query attention: 4·V·h·N·k operations forward, 10·V·h·N·k backward (scores again, dp, dv, dk, dq);
bytes forward K, V and q read, out, logsumexp and entropy written; backward K, V, q, out, its gradient and logsumexp
read, dK, dV and dq written. Bound by memory: K and V are nearly all of it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.workload import Contender, HostCall, Work, Workload, leaves, served_by
from fvlm.kernels.query_attention import query_attention
from fvlm.kernels.query_attention.op import frame_offsets

AT_ONCE = 32
"""Frames whose reference is computed in one go."""


class Shape(NamedTuple):
    """Every frame is looked at by the same number of queries."""

    frames: int = 512
    queries: int = 1
    """A frame."""
    heads: int = 6
    keys: int = 257
    width: int = 64

    @property
    def name(self) -> str:
        """As rows and figures are named."""
        return f"{self.frames} frames x {self.queries} queries, {self.heads} heads, {self.keys} keys, k={self.width}"


SHAPES = (Shape(), Shape(queries=8))
CROWDED = Shape(frames=16, queries=64)
WIDE = Shape(frames=16, queries=8, heads=6, width=128)
REHEARSED = (Shape(frames=3, queries=1, heads=2, keys=17, width=16), Shape(3, 2, 2, 17, 16))
ENCODER = (Shape(queries=257), Shape(queries=258))
ENCODER_REHEARSED = (Shape(3, 17, 2, 17, 16), Shape(3, 18, 2, 17, 16))


class Inputs(NamedTuple):
    """q [V, h, k]; key, value [F, N, h, k]; visual_frame int64 [V]; offsets int32 [F+1]; upstream like q."""

    q: Tensor
    key: Tensor
    value: Tensor
    visual_frame: Tensor
    offsets: Tensor
    upstream: Tensor


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Unit normal tensors from a fixed seed."""
    torch.manual_seed(0)
    queries = (shape.frames * shape.queries, shape.heads, shape.width)
    keys = (shape.frames, shape.keys, shape.heads, shape.width)
    q, key, value, upstream = (torch.randn(s, device=device).to(dtype) for s in (queries, keys, keys, queries))
    frame = torch.arange(shape.frames, device=device).repeat_interleave(shape.queries)
    return Inputs(q, key, value, frame, frame_offsets(frame, shape.frames), upstream)


def host_calls(dtype: torch.dtype, device: torch.device, rehearsed: bool = False) -> list[HostCall]:
    """The benchmark's shapes; beyond them every result with an upstream gradient, and more queries than a pack has."""
    if rehearsed:
        return [host_call(shape, dtype, device) for shape in REHEARSED]
    others = [host_call(SHAPES[0], dtype, device, all_gradients=True)]
    others += [host_call(shape, dtype, device) for shape in (CROWDED, WIDE)]
    return [*(host_call(shape, dtype, device) for shape in SHAPES), *(call._replace(trained=False) for call in others)]


def host_call(shape: Shape, dtype: torch.dtype, device: torch.device, all_gradients: bool = False) -> HostCall:
    """The kernels' host functions; with ``all_gradients`` logsumexp and entropy have upstream gradients too."""
    from fvlm.kernels.query_attention import kernel

    x = inputs(shape, dtype, device)
    tensors = (x.q, x.key, x.value, x.offsets)

    def backward(results: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
        out, lse, entropy = results
        more = (lse, entropy) if all_gradients else (None, None)
        return kernel.backward(*tensors, out, lse, entropy, x.upstream, *more, True)

    geometry = f"{shape.queries} a frame, k={shape.width}" + (", all gradients" if all_gradients else "")
    return HostCall("query_attention", geometry, lambda: kernel.forward(*tensors), backward)


def workload(shape: Shape, dtype: torch.dtype, device: torch.device) -> Workload:
    """Triton, torch and SDPA: over the frames' keys as they lie, or gathered a query as a pack would need it."""
    x = inputs(shape, dtype, device)

    def public(q: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return query_attention(q, key, value, x.visual_frame, x.offsets)[0]

    def sdpa(q: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return _attention(q.unflatten(0, (shape.frames, -1)), key, value).flatten(0, 1)

    def gathered(q: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = key.index_select(0, x.visual_frame), value.index_select(0, x.visual_frame)
        return _attention(q[:, None], key, value).squeeze(1)

    functions = {"triton": served_by("triton", public), "torch": served_by("torch", public), "sdpa": sdpa}
    if shape.queries == 1:  # with more, gathering copies every key as often
        functions["sdpa, gathered"] = gathered
    return Workload(
        name=f"query_attention {shape.name}",
        dtype=dtype,
        forward=_forward_work(x) + Work(0, 8 * x.q[..., 0].numel()),
        backward=_backward_work(x) + Work(0, 4 * x.q[..., 0].numel()),
        reference=lambda: _reference(x, shape),
        contenders=[Contender(name, f, leaves(x.q, x.key, x.value), x.upstream) for name, f in functions.items()],
    )


def encoder_workload(shape: Shape, dtype: torch.dtype, device: torch.device) -> Workload:
    """The encoder's attention through SDPA; queries are one more than keys where the coarse query rides along."""
    x = inputs(shape, dtype, device)

    def attend(q: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return _attention(q.unflatten(0, (shape.frames, -1)), key, value).flatten(0, 1)

    return Workload(
        name=f"encoder_attention {shape.name}",
        dtype=dtype,
        forward=_forward_work(x),
        backward=_backward_work(x),
        reference=lambda: _reference(x, shape),
        contenders=[Contender("sdpa", attend, leaves(x.q, x.key, x.value), x.upstream)],
    )


def _attention(q: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[., queries, h, k] over [., N, h, k]."""
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, key, value))).transpose(1, 2)


def _forward_work(x: Inputs) -> Work:
    return Work(4 * x.q.numel() * x.key.shape[1], x.key.nbytes + x.value.nbytes + 2 * x.q.nbytes)


def _backward_work(x: Inputs) -> Work:
    return Work(10 * x.q.numel() * x.key.shape[1], 2 * (x.key.nbytes + x.value.nbytes) + 4 * x.q.nbytes)


def _reference(x: Inputs, shape: Shape) -> dict[str, Tensor]:
    """By the definition in float64, a few frames at a time."""
    parts = []
    for q, key, value, upstream in zip(
        *(y.split(AT_ONCE) for y in (x.q.unflatten(0, (shape.frames, -1)), x.key, x.value)),
        x.upstream.unflatten(0, (shape.frames, -1)).split(AT_ONCE),
        strict=True,
    ):
        given = leaves(q.double(), key.double(), value.double())
        scores = torch.einsum("fqhk,fnhk->fhqn", given[0], given[1]) / shape.width**0.5
        out = torch.einsum("fhqn,fnhk->fqhk", scores.softmax(-1), given[2])
        d_q, d_key, d_value = torch.autograd.grad(out, given, upstream.double())
        parts.append((out.detach().flatten(0, 1), d_q.flatten(0, 1), d_key, d_value))
    return dict(zip(("out", "d_q", "d_key", "d_value"), map(torch.cat, zip(*parts, strict=True)), strict=True))
