"""Who serves a kernel call: the only place that asks for a device or reads ``FVLM_KERNELS``.

Every op hands in its back ends in order of preference. ``auto`` takes the first that can serve and logs
once which and why; a back end named in ``FVLM_KERNELS`` that cannot serve is an error, never replaced.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

logger = logging.getLogger(__name__)

NAMES = ("triton", "flash_attn", "torch", "reference")
_logged: set[tuple[str, str, str]] = set()


def _always(_: torch.Tensor) -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """One implementation of an op."""

    name: str
    function: Callable
    refuses: Callable[[torch.Tensor], str | None] = _always
    """Given the op's first tensor: the reason why this back end cannot serve it, or None."""


def select(op: str, backends: Sequence[Backend], probe: torch.Tensor) -> Callable:
    """The function that serves ``op`` for tensors like ``probe``.

    Raises:
        ValueError: ``FVLM_KERNELS`` holds an unknown name.
        RuntimeError: the back end that it names does not exist for this op or cannot serve this call.
    """
    requested = os.environ.get("FVLM_KERNELS", "auto")
    if requested == "auto":
        return _first_that_serves(op, backends, probe)
    if requested not in NAMES:
        raise ValueError(f"FVLM_KERNELS={requested!r}: expected auto or one of {', '.join(NAMES)}")
    for backend in backends:
        if backend.name == requested:
            if reason := backend.refuses(probe):
                raise RuntimeError(f"FVLM_KERNELS={requested}: {op} cannot be served: {reason}")
            return backend.function
    offered = ", ".join(backend.name for backend in backends)
    raise RuntimeError(
        f"FVLM_KERNELS={requested}: {op} has no such back end (it has: {offered}); use one of these or auto"
    )


def _first_that_serves(op: str, backends: Sequence[Backend], probe: torch.Tensor) -> Callable:
    passed_over = []
    for backend in backends:
        reason = backend.refuses(probe)
        if reason is None:
            key = (op, backend.name, probe.device.type)
            if key not in _logged:
                _logged.add(key)
                because = f" ({'; '.join(passed_over)})" if passed_over else ""
                logger.info("%s on %s: %s%s", op, probe.device.type, backend.name, because)
            return backend.function
        passed_over.append(f"not {backend.name}: {reason}")
    raise RuntimeError(f"{op}: no back end can serve this call ({'; '.join(passed_over)})")


def require(condition: bool, op: str, argument: str, expected: str, got: object) -> None:
    """Raise ``ValueError`` naming the argument unless ``condition`` holds."""
    if not condition:
        raise ValueError(f"{op}: {argument} must be {expected}, got {got}")


def debug_checks() -> bool:
    """Whether checks that read device values are on (``FVLM_DEBUG=1``)."""
    return os.environ.get("FVLM_DEBUG") == "1"
