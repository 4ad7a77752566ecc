"""How long device work takes, and how fast this device copies and multiplies.

Every timed run starts with a cold L2. *Called* is the time from a call on an idle device to the end of its last
kernel, so it holds the launch overhead; *replayed* is that of a CUDA graph of the same kernels, started from a full
queue, which leaves the kernels alone. On the CPU, where benchmarks only rehearse, wall-clock time stands in for both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

WARM_UP = 3


class Times(NamedTuple):
    """Milliseconds of repeated runs."""

    median: float
    p20: float
    p80: float


def summary(milliseconds: Sequence[float]) -> Times:
    """Median and the quantiles beside it, by linear interpolation."""
    quantiles = torch.tensor(milliseconds, dtype=torch.float64).quantile(torch.tensor([0.5, 0.2, 0.8]).double())
    return Times(*quantiles.tolist())


class Timer:
    """Times functions on one device.

    Args:
        runs: timed runs of each function, after a warm-up.
    """

    def __init__(self, device: torch.device, runs: int):
        self.device = device
        self.runs = runs
        self.cuda = device.type == "cuda"
        if self.cuda:
            l2 = torch.cuda.get_device_properties(device).L2_cache_size
            self._flushed = torch.empty(max(2 * l2, 2**26) // 4, dtype=torch.int32, device=device)

    def called(self, function: Callable[[Any], Any], prepare: Callable[[], Any] = lambda: None) -> Times:
        """Times of ``function(prepare())``; ``prepare`` runs untimed before each."""
        for _ in range(WARM_UP if self.cuda else 0):
            function(prepare())
        return summary([self._once(function, prepare()) for _ in range(self.runs)])

    def _once(self, function: Callable[[Any], Any], prepared: Any) -> float:
        if not self.cuda:
            start = time.perf_counter()
            function(prepared)
            return 1e3 * (time.perf_counter() - start)
        self._flush()
        torch.cuda.synchronize(self.device)
        with _Span() as span:
            function(prepared)
        return span.milliseconds()

    def replayed(self, *graphs: torch.cuda.CUDAGraph, before: torch.cuda.CUDAGraph | None = None) -> Times:
        """Times of graphs replayed one right after the other; ``before`` is replayed untimed ahead of each run."""
        spans = []
        for _ in range(WARM_UP + self.runs):
            if before is not None:
                before.replay()
            self._flush()  # also keeps the device busy while the graphs are handed over
            with _Span() as span:
                for graph in graphs:
                    graph.replay()
            spans.append(span)
        return summary([span.milliseconds() for span in spans[WARM_UP:]])

    def kernels_alone(self, function: Callable[[], Any]) -> Times:
        """Times of what ``function`` launches: replayed, or on the CPU called."""
        if self.cuda:
            return self.replayed(*capture(lambda _: function()))
        return self.called(lambda _: function())

    def _flush(self) -> None:
        self._flushed.zero_()

    def copy_rate(self, megabytes: int) -> float:
        """GB/s of a device-to-device copy, bytes read and bytes written."""
        source = torch.randn(megabytes * 2**18, device=self.device)
        target = torch.empty_like(source)
        milliseconds = self.kernels_alone(lambda: target.copy_(source)).median
        return 2 * source.nbytes / milliseconds / 1e6

    def gemm_rate(self, size: int, dtype: torch.dtype = torch.bfloat16) -> float:
        """TFLOP/s of a square product of random matrices."""
        a, b = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        return 2 * size**3 / self.kernels_alone(lambda: torch.mm(a, b, out=out)).median / 1e9

    def extra_memory(self, function: Callable[[], Any]) -> int | None:
        """Bytes that ``function`` needs at its peak beyond what was there before and what it returns."""
        if not self.cuda:
            return None
        function()  # allocates what outlives a call, such as a library's workspace
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        returned = function()
        torch.cuda.synchronize(self.device)
        own = sum(x.nbytes for x in returned if isinstance(x, Tensor))
        return torch.cuda.max_memory_allocated(self.device) - before - own


class _Span:
    """CUDA events around a block of launches."""

    def __enter__(self) -> _Span:
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.start.record()
        return self

    def __exit__(self, *_: object) -> None:
        self.end.record()

    def milliseconds(self) -> float:
        """Waits for the block's end."""
        self.end.synchronize()
        return self.start.elapsed_time(self.end)


def capture(*steps: Callable[[Any], Any]) -> list[torch.cuda.CUDAGraph]:
    """A CUDA graph of what each step launches; a step is given what the one before it returned.

    All are captured on one stream and share one memory pool, so what a step left for the next stays there: replay the
    graphs in the same order.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    pool = torch.cuda.graph_pool_handle()
    graphs = []
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):  # compiles, and makes what libraries keep
            passed_on = None
            for step in steps:
                passed_on = step(passed_on)
        passed_on = None
        for step in steps:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                passed_on = step(passed_on)
            graphs.append(graph)
    torch.cuda.current_stream().wait_stream(stream)
    return graphs
