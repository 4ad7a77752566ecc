"""Who serves a kernel call: the only place that asks for a device or reads ``FVLM_KERNELS``.

Every op hands in its back ends in order of preference. ``auto`` takes the first that can serve and logs
once which and why; a back end named in ``FVLM_KERNELS`` that cannot serve is an error, never replaced.
``FVLM_KERNELS=torch`` names one for every op, ``FVLM_KERNELS=varlen_attention:flash_attn`` (comma-separated)
one for an op. Under ``torch.compile`` the choice is made when the graph is traced.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

NAMES = ("triton", "flash_attn", "torch", "reference")
OPS = ("query_attention", "varlen_attention", "linear_cross_entropy")
_logged: set[tuple[str, str, str, torch.dtype]] = set()


def _never(probe: Tensor, named: bool) -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """One implementation of an op."""

    name: str
    function: Callable
    refuses: Callable[[Tensor, bool], str | None] = _never
    """Given the op's first tensor and whether this back end was named: why it cannot serve the call, or None."""


def select(op: str, backends: Sequence[Backend], probe: Tensor) -> Callable:
    """The function that serves ``op`` for tensors like ``probe``.

    Raises:
        ValueError: ``FVLM_KERNELS`` holds an unknown name.
        RuntimeError: the back end that it names does not exist for this op or cannot serve this call.
    """
    requested = _requested(op)
    if requested == "auto":
        return _first_that_serves(op, backends, probe)
    for backend in backends:
        if backend.name == requested:
            if reason := backend.refuses(probe, True):
                raise RuntimeError(f"FVLM_KERNELS: {op} cannot be served by {requested}: {reason}")
            return backend.function
    offered = ", ".join(backend.name for backend in backends)
    raise RuntimeError(
        f"FVLM_KERNELS: {op} has no back end {requested} (it has: {offered}); to name one for a single op, "
        f"write FVLM_KERNELS=op:name"
    )


def _requested(op: str) -> str:
    """The back end that ``FVLM_KERNELS`` names for ``op``, or ``auto``."""
    setting = os.environ.get("FVLM_KERNELS", "auto")
    chosen = {"": "auto"}
    for part in setting.split(","):
        name_of_op, _, name = part.strip().rpartition(":")
        if name not in ("auto", *NAMES) or name_of_op not in ("", *OPS):
            raise ValueError(
                f"FVLM_KERNELS={setting!r}: expected auto or one of {', '.join(NAMES)}, for every op or as "
                f"op:name with op one of {', '.join(OPS)}"
            )
        chosen[name_of_op] = name
    return chosen.get(op, chosen[""])  # what names the op wins, wherever it stands


def _first_that_serves(op: str, backends: Sequence[Backend], probe: Tensor) -> Callable:
    passed_over = []
    for backend in backends:
        reason = backend.refuses(probe, False)
        if reason is None:
            _log_once(op, backend.name, probe, passed_over)
            return backend.function
        passed_over.append(f"not {backend.name}: {reason}")
    raise RuntimeError(f"{op}: no back end can serve this call ({'; '.join(passed_over)})")


def _log_once(op: str, name: str, probe: Tensor, passed_over: list[str]) -> None:
    if torch.compiler.is_compiling():  # a log line would break the graph
        return
    key = (op, name, probe.device.type, probe.dtype)
    if key not in _logged:
        _logged.add(key)
        because = f" ({'; '.join(passed_over)})" if passed_over else ""
        dtype = str(probe.dtype).removeprefix("torch.")
        logger.info("%s, %s on %s: %s%s", op, dtype, probe.device.type, name, because)


def under_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's precision where it is on, as torch's own products and attention take them."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x.dtype != torch.float64 else x for x in tensors)


def without_autocast(function: Callable) -> Callable:
    """The function with autocast off: a reference computes in the precision that it says."""

    @functools.wraps(function)
    def exact(probe: Tensor, *arguments):
        with torch.autocast(probe.device.type, enabled=False):
            return function(probe, *arguments)

    return exact


def require(condition: bool, op: str, argument: str, expected: str, got: object) -> None:
    """Raise ``ValueError`` naming the argument unless ``condition`` holds."""
    if not condition:
        raise ValueError(f"{op}: {argument} must be {expected}, got {got}")


def debug_checks() -> bool:
    """Whether checks that read device values are on (``FVLM_DEBUG=1``; never while a graph is traced)."""
    return os.environ.get("FVLM_DEBUG") == "1" and not torch.compiler.is_compiling()
