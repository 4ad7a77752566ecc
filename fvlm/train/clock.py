"""Wall time of a run over all its starts, and its rates between records."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fvlm.model.flops import peak_flops

GIB = 2**30


class Clock:
    """Counts what training does per second; evaluation and checkpoints are left out through `paused`.

    Args:
        before: seconds that earlier starts of the run took.
        device: of this rank.
        num_devices: over all ranks.
    """

    def __init__(self, before: float, device: torch.device, num_devices: int):
        self._before, self._device, self._num_devices = before, device, num_devices
        self._started = time.perf_counter()
        self._reset(self._started)

    def wall_seconds(self) -> float:
        """Seconds since the run's very first start, the time between a kill and its resumption left out."""
        return self._before + time.perf_counter() - self._started

    def count(self, *, samples: int, tokens: int, flops: float) -> None:
        """Add what one step did, over all ranks."""
        self._counts.update({"steps": 1, "samples": samples, "tokens": tokens, "flops": flops})

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside does not count as training."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - begun

    def rates(self, until: float | None = None) -> dict[str, float | None]:
        """Rates over all ranks since the last call, up to when the last step was done (`time.perf_counter`; None: now).

        MFU is None where the device's peak is unknown, memory on a CPU.
        """
        until = time.perf_counter() if until is None else until
        seconds, counts = until - self._since - self._paused, self._counts
        mfu = allocated = reserved = None
        if self._device.type == "cuda":
            peak = peak_flops(torch.cuda.get_device_name(self._device))
            mfu = counts["flops"] / (seconds * peak * self._num_devices) if peak else None
            allocated, reserved = torch.cuda.memory_allocated(self._device), torch.cuda.memory_reserved(self._device)
        self._reset(until)
        return {
            "step_sec": seconds / max(1, counts["steps"]),
            "throughput_samples_sec": counts["samples"] / seconds,
            "tokens_sec": counts["tokens"] / seconds,
            "tflops": counts["flops"] / seconds / 1e12,
            "mfu": mfu,
            "gpu_mem_allocated_gb": None if allocated is None else allocated / GIB,
            "gpu_mem_reserved_gb": None if reserved is None else reserved / GIB,
        }

    def _reset(self, since: float) -> None:
        self._since, self._paused = since, 0.0
        self._counts: Counter = Counter()
