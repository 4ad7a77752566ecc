"""Which tiles are fastest on this GPU, for each kernel and variant (``python -m benchmarks.kernels --tune``)."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.kernels_compile import compile_all, jobs, tiles_name
from benchmarks.timing import Timer
from benchmarks.workload import LIMITS, relative_error
from benchmarks.workloads import host_calls
from fvlm.kernels.launching import Tiles, forced, recording

DTYPE = torch.bfloat16


class Tried(NamedTuple):
    """One candidate on one geometry."""

    kernel: str
    variant: str
    geometry: str
    tiles: Tiles
    milliseconds: float | None
    """Of the forward or backward pass that the kernel is part of; None where the candidate gave wrong results."""


def compile_for(device: torch.device, ops: Sequence[str]) -> None:
    """Compile every candidate on all cores: Triton's cache then has what the search will start."""
    major, minor = torch.cuda.get_device_capability(device)
    todo = jobs(ops, ["bf16"], [10 * major + minor], default_only=False)
    compile_all(todo, max(1, (os.cpu_count() or 1) // 2))


def search(ops: Sequence[str], timer: Timer, rehearsed: bool = False) -> list[Tried]:
    """Time every candidate of every kernel, one kernel at a time, the others with the best found so far."""
    tried: list[Tried] = []
    for op in ops:
        for call in host_calls(op, DTYPE, timer.device, rehearsed):
            if not call.trained:
                continue
            results = call.forward()
            for run in (call.forward, lambda call=call, results=results: call.backward(results)):
                tried += _search_pass(call.geometry, run, timer)
            del results, run
    return tried


def _search_pass(geometry: str, run: Callable[[], Any], timer: Timer) -> list[Tried]:
    """The kernels that one pass starts, in their order."""
    with recording() as recorded:
        run()
    tried: list[Tried] = []
    best: dict[str, Tiles] = {}
    expected = _tensors(run())
    for kernel, (variant, candidates) in recorded.choices.items():
        times = []
        for tiles in tqdm(candidates, desc=f"{kernel}, {geometry}", unit="candidate", file=sys.stderr):
            with ExitStack() as stack:
                for name, choice in {**best, kernel: tiles}.items():
                    stack.enter_context(forced(name, choice))
                times.append(_time(run, expected, timer))
            tried.append(Tried(kernel, variant, geometry, tiles, times[-1]))
        sound = [(time, tiles) for time, tiles in zip(times, candidates, strict=True) if time is not None]
        if not sound:
            raise RuntimeError(f"{kernel}, {variant}, {geometry}: no candidate agrees with the tiles in use")
        best[kernel] = min(sound, key=lambda each: each[0])[1]
    return tried


def _time(run: Callable[[], Any], expected: Sequence[Tensor], timer: Timer) -> float | None:
    """Median of a pass's kernels alone; None where its results are not those expected."""
    got = _tensors(run())
    worst = max(relative_error(a, b) for a, b in zip(got, expected, strict=True))
    if not worst <= LIMITS[DTYPE]:
        return None
    return timer.kernels_alone(run).median


def _tensors(results: Any) -> list[Tensor]:
    return [x.clone() for x in results]


def winners(tried: Sequence[Tried]) -> dict[str, dict[str, Tiles]]:
    """Kernel → variant → the tiles with the best mean time over geometries, each relative to its first candidate."""
    relative: dict[tuple[str, str], dict[str, list[float]]] = {}
    tiles_of: dict[str, Tiles] = {}
    first: dict[tuple[str, str, str], float] = {}
    for each in tried:
        name = tiles_name(each.tiles)
        tiles_of[name] = each.tiles
        if each.milliseconds is None:
            continue
        base = first.setdefault((each.kernel, each.variant, each.geometry), each.milliseconds)
        times = relative.setdefault((each.kernel, each.variant), {})
        times.setdefault(name, []).append(each.milliseconds / base)
    table: dict[str, dict[str, Tiles]] = {}
    for (kernel, variant), times in relative.items():
        most = max(map(len, times.values()))  # right on every geometry
        mean = {name: sum(t) / len(t) for name, t in times.items() if len(t) == most}
        table.setdefault(kernel, {})[variant] = tiles_of[min(mean, key=mean.get)]
    return table


def merged(file: Path, table: dict[str, dict[str, Tiles]]) -> dict[str, dict[str, dict[str, Any]]]:
    """The table as JSON holds it, over what the file says of other kernels and variants."""
    before = json.loads(file.read_text(encoding="utf-8"))["tiles"] if file.exists() else {}
    for kernel, choices in table.items():
        before.setdefault(kernel, {}).update({variant: tiles._asdict() for variant, tiles in choices.items()})
    return before


def figures(tried: Sequence[Tried]) -> dict[str, float | None]:
    """Flat: candidate → milliseconds of its pass."""
    return {
        f"{each.kernel}, {each.variant}, {each.geometry}, {tiles_name(each.tiles)}/pass_ms": each.milliseconds
        for each in tried
    }


def rows(tried: Sequence[Tried], table: dict[str, dict[str, Tiles]]) -> list[dict[str, str]]:
    """For a table: every candidate's time, the winner marked."""
    return [
        {
            "kernel": each.kernel,
            "variant": each.variant,
            "shape": each.geometry,
            "tiles": tiles_name(each.tiles),
            "pass, ms": "wrong" if each.milliseconds is None else f"{each.milliseconds:.4f}",
            "best": "x" if table[each.kernel][each.variant] == each.tiles else "",
        }
        for each in tried
    ]
