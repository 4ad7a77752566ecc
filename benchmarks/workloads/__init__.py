"""The kernels' benchmarks, one file an op."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks.workload import HostCall, Workload
from benchmarks.workloads import linear_cross_entropy, query_attention, varlen_attention

MODULES = {
    "query_attention": query_attention,
    "varlen_attention": varlen_attention,
    "linear_cross_entropy": linear_cross_entropy,
}
NAMES = (*MODULES, "encoder_attention")


def host_calls(op: str, dtype: torch.dtype, device: torch.device, rehearsed: bool = False) -> list[HostCall]:
    """Calls of an op's host functions at every geometry of the supported models, or at tiny ones.

    On the meta device tensors have no memory: such calls are for :func:`fvlm.kernels.launching.recording`.
    """
    return MODULES[op].host_calls(dtype, device, rehearsed)


def workloads(
    names: list[str], dtype: torch.dtype, device: torch.device, rehearsed: bool = False
) -> Iterator[Callable[[], Workload]]:
    """What makes each workload of these names; only the one at hand should hold memory."""
    for name in names:
        if name == "encoder_attention":
            make = query_attention.encoder_workload
            shapes = query_attention.ENCODER_REHEARSED if rehearsed else query_attention.ENCODER
        else:
            make = MODULES[name].workload
            shapes = MODULES[name].REHEARSED if rehearsed else MODULES[name].SHAPES
        yield from (partial(make, shape, dtype, device) for shape in shapes)
