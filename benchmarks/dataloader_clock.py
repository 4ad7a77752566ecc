"""What a stream of batches costs: time, time of the processor, memory. Nothing of fvlm, for rivals use it too."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psutil
import torch


def measure(batches: Iterable[tuple[int, int]], warm_up: int, samples: int, num_workers: int) -> dict[str, float]:
    """Read on until `samples` samples are behind the first `warm_up` ones; `batches` gives (samples, frames) of each.

    Returns batches, samples and frames a second, and a second of processor time, in which this process and all its
    children count, and what `memory` says at the end. Raises ValueError if the stream ends before.
    """
    seen, counted, start = 0, [0, 0, 0], None
    for num_samples, num_frames in batches:
        seen += num_samples
        if start is None:
            start = (time.perf_counter(), processor_seconds()) if seen >= warm_up else None
            continue
        counted = [a + b for a, b in zip(counted, (1, num_samples, num_frames), strict=True)]
        if counted[1] >= samples:
            wall, busy = time.perf_counter() - start[0], processor_seconds() - start[1]
            held = memory(num_workers)
            break
    else:
        raise ValueError(f"{seen} samples in all, expected {warm_up} + {samples} and some more")
    names = ("batches", "samples", "frames")
    return {
        **{f"{name}_per_s": count / wall for name, count in zip(names, counted, strict=True)},
        **{f"{name}_per_core_s": count / busy for name, count in zip(names, counted, strict=True)},
        "cores_used": busy / wall,
        **held,
    }


def processor_seconds() -> float:
    """Time that this process and its living children have been computing."""
    this = psutil.Process()
    times = [each.cpu_times() for each in (this, *this.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def memory(num_workers: int) -> dict[str, float]:
    """MiB: `resident_mib` of the worker that has most, or of this process without workers; `own_mib` likewise.

    What is resident counts shared memory in full (libraries, indexes, buffers), what is its own does not at all.
    """
    this = psutil.Process()
    found = [each.memory_full_info() for each in (this.children() if num_workers else [this])]
    return {
        "resident_mib": max(each.rss for each in found) / 2**20,
        "own_mib": max(each.uss for each in found) / 2**20,
    }


def reading(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The arguments of a process that reads one stream."""
    parser.add_argument("folder", type=Path, help="what benchmarks.dataloader has drawn")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--warm-up", type=int, default=256, metavar="SAMPLES")
    parser.add_argument("--samples", type=int, default=1024)
    return parser


def print_figures(stream: Callable[[], Iterable[tuple[int, int]]], asked: argparse.Namespace, **more: Any) -> None:
    """Measure on one thread a process, and print the figures as the last line, in JSON."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the workers
    print(json.dumps({**measure(stream(), asked.warm_up, asked.samples, asked.workers), **more}))
