"""Head and cross-entropy at SmolLM2's geometries, a share of the rows labelled.

Shapes: K rows of which R carry a label, d width, V vocabulary.

Necessary work: 2·R·d·V operations forward, 4·R·d·V backward (both gradients; logits computed again do not count); bytes
forward the labelled rows and the weight read, a log-probability a row written; backward the same read, both gradients
written. Bound by arithmetic. Hidden states and weight are random, so the softmax is flat: an implementation that skips
small gradients has nothing to skip here.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.workload import Contender, HostCall, Work, Workload, leaves, served_by
from fvlm.kernels.linear_cross_entropy import linear_cross_entropy

AT_ONCE = 512
"""Rows whose reference is computed in one go."""
IGNORED = -100


class Shape(NamedTuple):
    """A pack's hidden states and the tied head."""

    model: str
    width: int
    rows: int = 16384
    vocabulary: int = 49152
    labelled: float = 0.3
    per_token: bool = False
    """An upstream gradient a row, as DPO has, instead of one for the sum."""

    @property
    def name(self) -> str:
        """As rows and figures are named."""
        mode = "a gradient a token" if self.per_token else "sum"
        return f"d={self.width}, {self.vocabulary} entries, {self.rows} rows, {self.labelled:.0%} labelled, {mode}"


SIZES = (Shape("135m", 576), Shape("360m", 960), Shape("1.7B", 2048))
SHAPES = (*SIZES, *(shape._replace(per_token=True) for shape in SIZES))
REHEARSED = (Shape("tiny", 32, 24, 80), Shape("tiny", 32, 24, 80, per_token=True))


class Inputs(NamedTuple):
    """hidden [K, d]; weight [V, d]; labels int64 [K]; upstream [K], or a scalar for the sum."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    upstream: Tensor


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Unit normal hidden states, a head with SmolLM2's initial deviation, from a fixed seed."""
    torch.manual_seed(0)
    hidden = torch.randn(shape.rows, shape.width, device=device).to(dtype)
    weight = (0.04 * torch.randn(shape.vocabulary, shape.width, device=device)).to(dtype)
    labels = torch.randint(shape.vocabulary, (shape.rows,), device=device)
    labels = torch.where(torch.rand(shape.rows, device=device) < shape.labelled, labels, IGNORED)
    upstream = torch.randn(shape.rows, device=device) if shape.per_token else torch.ones((), device=device)
    return Inputs(hidden, weight, labels, upstream)


def host_calls(dtype: torch.dtype, device: torch.device, rehearsed: bool = False) -> list[HostCall]:
    """Every size of SmolLM2; the kernels do not tell a sum from a gradient a token."""
    return [host_call(shape, dtype, device) for shape in (REHEARSED[:1] if rehearsed else SIZES)]


def host_call(shape: Shape, dtype: torch.dtype, device: torch.device) -> HostCall:
    """The kernels' host functions."""
    from fvlm.kernels.linear_cross_entropy import kernel

    x = inputs(shape._replace(per_token=True), dtype, device)
    tensors = (x.hidden, x.weight, x.labels)
    return HostCall(
        "linear_cross_entropy",
        f"d={shape.width}",
        lambda: kernel.forward(*tensors),
        lambda results: kernel.backward(x.upstream, *tensors, *results[1:], True, True),
    )


def workload(shape: Shape, dtype: torch.dtype, device: torch.device) -> Workload:
    """Triton; torch in chunks, on all rows, on labelled rows, and that compiled; Liger and cut-cross-entropy."""
    x = inputs(shape, dtype, device)
    rows = (x.labels != IGNORED).nonzero().squeeze(1)  # known beforehand, so that nobody waits for the device
    result = (lambda out: out.logprobs) if shape.per_token else (lambda out: out.loss_sum)
    reduction = "none" if shape.per_token else "sum"
    sign = -1 if shape.per_token else 1

    def public(hidden: Tensor, weight: Tensor) -> Tensor:
        return result(linear_cross_entropy(hidden, weight, x.labels))

    def plain(hidden: Tensor, weight: Tensor) -> Tensor:
        return sign * F.cross_entropy((hidden @ weight.T).float(), x.labels, reduction=reduction)

    def labelled(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = hidden.index_select(0, rows) @ weight.T
        return sign * F.cross_entropy(logits.float(), x.labels[rows], reduction=reduction)

    def in_all_rows(y: Tensor) -> Tensor:
        return x.labels.new_zeros(shape.rows, dtype=y.dtype).index_copy(0, rows, y) if y.ndim == 1 else y

    torch.compiler.reset()  # or a second width would be compiled for any width
    compiled = torch.compile(labelled, dynamic=False, backend="inductor" if device.type == "cuda" else "aot_eager")
    on_all = {"triton": served_by("triton", public), "torch": served_by("torch", public), "torch, at once": plain}
    on_labelled = {"torch, labelled rows": labelled, "torch, labelled rows, compiled": compiled}
    if device.type == "cuda":
        on_all |= _installed(x, reduction, sign)
    upstream = x.upstream[rows] if shape.per_token else x.upstream
    return Workload(
        name=f"linear_cross_entropy {shape.name}",
        dtype=dtype,
        forward=_forward_work(x, len(rows)),
        backward=_forward_work(x, len(rows)) + _gradient_work(x, len(rows)),
        reference=lambda: _reference(x, rows),
        contenders=[
            *(Contender(name, f, leaves(x.hidden, x.weight), x.upstream) for name, f in on_all.items()),
            *(Contender(name, f, leaves(x.hidden, x.weight), upstream, in_all_rows) for name, f in on_labelled.items()),
        ],
    )


def _installed(x: Inputs, reduction: str, sign: int) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Other people's fused kernels, where they are installed and offer this reduction."""
    found: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}
    if find_spec("liger_kernel") and reduction == "sum":
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORED, reduction=reduction)
        found["liger"] = lambda hidden, weight: liger(weight, hidden, x.labels)
    if find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy as cut

        found["cut_cross_entropy"] = lambda hidden, weight: (
            sign * cut(hidden, weight, x.labels, ignore_index=IGNORED, reduction=reduction)
        )
    return found


def _forward_work(x: Inputs, num_labels: int) -> Work:
    row_bytes = x.hidden[0].nbytes
    return Work(2 * num_labels * x.weight.numel(), num_labels * row_bytes + x.weight.nbytes + 4 * len(x.hidden))


def _gradient_work(x: Inputs, num_labels: int) -> Work:
    """What the backward pass has to do beyond what reading as much as the forward pass did costs."""
    return Work(2 * num_labels * x.weight.numel(), x.hidden.nbytes + x.weight.nbytes)


def _reference(x: Inputs, rows: Tensor) -> dict[str, Tensor]:
    """By the definition in float64, some rows at a time."""
    weight = x.weight.double()
    logprobs = weight.new_zeros(len(x.hidden))
    d_hidden, d_weight = weight.new_zeros(x.hidden.shape), torch.zeros_like(weight)
    for chunk in rows.split(AT_ONCE):
        hidden, labels = x.hidden[chunk].double(), x.labels[chunk]
        log_p = (hidden @ weight.T).log_softmax(-1)
        logprobs[chunk] = log_p.gather(1, labels[:, None]).squeeze(1)
        upstream = x.upstream[chunk].double() if x.upstream.ndim else -x.upstream.double().expand(len(chunk))
        d_logits = log_p.exp_().neg_()
        d_logits[torch.arange(len(chunk), device=labels.device), labels] += 1
        d_logits *= upstream[:, None]
        d_hidden[chunk] = d_logits @ weight
        d_weight += d_logits.T @ hidden
    out = logprobs if x.upstream.ndim else -logprobs.sum()
    return {"out": out, "d_hidden": d_hidden, "d_weight": d_weight}
