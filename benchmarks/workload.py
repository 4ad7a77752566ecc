"""What the kernels' benchmarks are made of: one piece of work, and those who contend to do it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

LIMITS = {torch.bfloat16: 1e-2, torch.float32: 1e-4}
"""Largest ‖got − reference‖ / ‖reference‖ with which a result counts as right."""


class Work(NamedTuple):
    """The least that must be done, whoever does it."""

    flops: float
    """Operations of the products, two for a multiplication with its addition."""
    bytes: float
    """Every input read once, every output written once."""

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class Contender:
    """One implementation, ready to run."""

    name: str
    function: Callable[..., Tensor]
    """Of the leaves, to one output."""
    leaves: tuple[Tensor, ...]
    upstream: Tensor
    """Gradient of the output."""
    as_reference: Callable[[Tensor], Tensor] = lambda x: x
    """An output or gradient in the layout of the reference's."""

    def forward(self) -> Tensor:
        """The output, with its graph."""
        return self.function(*self.leaves)

    def backward(self, out: Tensor) -> tuple[Tensor, ...]:
        """Gradients of the leaves; ends the output's graph."""
        return torch.autograd.grad(out, self.leaves, self.upstream)

    def both(self) -> tuple[Tensor, ...]:
        """The output and the gradients of the leaves."""
        out = self.forward()
        return (out.detach(), *self.backward(out))


@dataclass(frozen=True)
class Workload:
    """Inputs of one shape, what they cost at least, the right results, and the contenders."""

    name: str
    dtype: torch.dtype
    forward: Work
    backward: Work
    reference: Callable[[], dict[str, Tensor]]
    """Name → float64: the output first, then the gradients in the leaves' order."""
    contenders: Sequence[Contender]


class HostCall(NamedTuple):
    """The functions that start an op's kernels, with their arguments."""

    op: str
    geometry: str
    forward: Callable[[], Any]
    backward: Callable[[Any], Any]
    """Of what ``forward`` returned."""
    trained: bool = True
    """Whether training calls it so; if not, it is compiled, but does not decide which tiles are best."""


def served_by(backend: str, function: Callable) -> Callable:
    """The public op with its back end named, as a user would name it."""

    def call(*arguments: Any) -> Any:
        before = os.environ.get("FVLM_KERNELS")
        os.environ["FVLM_KERNELS"] = backend
        try:
            return function(*arguments)
        finally:
            if before is None:
                del os.environ["FVLM_KERNELS"]
            else:
                os.environ["FVLM_KERNELS"] = before

    return call


def leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The same memory, as tensors that want gradients."""
    return tuple(x.detach().requires_grad_() for x in tensors)


def errors(contender: Contender, reference: dict[str, Tensor]) -> dict[str, float]:
    """‖got − reference‖ / ‖reference‖ of the output and each gradient; what was never written is NaN."""
    with _poisoned_memory():
        got = contender.both()
    return {
        name: relative_error(contender.as_reference(x), expected)
        for x, (name, expected) in zip(got, reference.items(), strict=True)
    }


def relative_error(got: Tensor, expected: Tensor) -> float:
    """‖got − expected‖ / ‖expected‖ in float64; infinite where a value is not finite or the shapes differ."""
    if got.shape != expected.shape:
        return float("inf")
    error = float(torch.linalg.vector_norm(got.double() - expected.double()))
    scale = float(torch.linalg.vector_norm(expected.double()))
    relative = error / scale if scale else error
    return relative if relative == relative else float("inf")


@contextmanager
def _poisoned_memory() -> Iterator[None]:
    """Memory is handed out filled with NaN, as torch does it in its deterministic mode."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)
