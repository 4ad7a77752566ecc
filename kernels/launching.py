"""How Triton kernels are started: on which devices, with which tiles; ``benchmarks/kernels_compile.py`` listens in.

Triton itself is imported by the ``kernel.py`` files alone, and these only when a call needs them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

TUNED = Path(__file__).with_name("tuned")
"""One JSON a measured GPU model: kernel → variant → the tiles that won (``python -m benchmarks.kernels --tune``)."""


class Tiles(NamedTuple):
    """Compile-time choices of one launch."""

    blocks: dict[str, int]
    num_warps: int
    num_stages: int


def tiles(block: str, *choices: tuple[int, int, int]) -> list[Tiles]:
    """Candidates with one block size: (block, warps, stages) each."""
    return [Tiles({block: size}, num_warps, num_stages) for size, num_warps, num_stages in choices]


class Launch(NamedTuple):
    """One launch as it was asked for, while :func:`recording`."""

    kernel: Any
    arguments: dict[str, Any]
    tiles: Tiles


class Recording(list[Launch]):
    """Launches in their order, and the choices that were made for them: kernel → variant and candidates."""

    def __init__(self) -> None:
        super().__init__()
        self.choices: dict[str, tuple[str, Sequence[Tiles]]] = {}


_recorded: Recording | None = None
_forced: dict[str, Tiles] = {}


def refuses_triton(probe: Tensor, named: bool) -> str | None:
    """Why Triton cannot serve tensors like ``probe``, or None; its interpreter serves only where it was named."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install 'fvlm[gpu]')"
    if probe.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"Triton kernels take bfloat16, float16 and float32, not {str(probe.dtype).removeprefix('torch.')}"
    if probe.device.type == "cuda":
        return None
    if named and probe.is_meta:
        return None  # shapes alone: what a dry run of the memory asks for
    if not named:
        return "Triton needs a GPU"
    return None if interpreted() else "Triton needs a GPU, or its interpreter (TRITON_INTERPRET=1 before the start)"


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def variant(probe: Tensor, **sizes: int) -> str:
    """What a choice of tiles may depend on, as the key of the tuned tables, such as ``bfloat16 k=64``."""
    return " ".join([str(probe.dtype).removeprefix("torch."), *(f"{name}={size}" for name, size in sizes.items())])


def choose(kernel: str, key: str, candidates: dict[int, Sequence[Tiles]], probe: Tensor) -> Tiles:
    """The tiles of ``kernel``: what was measured on this GPU model, else the first candidate.

    Args:
        candidates: by bytes an element; no candidate may spill registers (``benchmarks/kernels_compile.py``).
    """
    if _recorded is not None:
        _recorded.choices[kernel] = (key, candidates[probe.element_size()])
    if kernel in _forced:
        return _forced[kernel]
    return _tuned(_gpu(probe.device)).get(kernel, {}).get(key, candidates[probe.element_size()][0])


def launch(kernel: Any, num_programs: int, tiles: Tiles, **arguments: Any) -> None:
    """Start ``num_programs`` programs of a Triton kernel."""
    if _recorded is not None:
        _recorded.append(Launch(kernel, arguments, tiles))
        return
    if interpreted():
        kernel[(num_programs,)](**arguments, **tiles.blocks)
        return
    device = next(x.device for x in arguments.values() if isinstance(x, Tensor))
    with torch.cuda.device(device):  # Triton starts on the current device, whatever the tensors' own
        kernel[(num_programs,)](**arguments, **tiles.blocks, num_warps=tiles.num_warps, num_stages=tiles.num_stages)


@contextmanager
def recording(into: Recording | None = None) -> Iterator[Recording]:
    """Collect launches instead of running them, in ``into`` where the caller brings its own."""
    global _recorded
    _recorded = Recording() if into is None else into
    try:
        yield _recorded
    finally:
        _recorded = None


@contextmanager
def forced(kernel: str, tiles: Tiles) -> Iterator[None]:
    """Let ``kernel`` run with these tiles, whatever was measured."""
    _forced[kernel] = tiles
    try:
        yield
    finally:
        del _forced[kernel]


@cache
def _gpu(device: torch.device) -> str:
    return gpu_slug(torch.cuda.get_device_name(device)) if device.type == "cuda" else ""


def gpu_slug(name: str) -> str:
    """A GPU model's name as a file name: ``NVIDIA H200`` → ``nvidia-h200``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@cache
def _tuned(gpu: str) -> dict[str, dict[str, Tiles]]:
    file = TUNED / f"{gpu}.json"
    if not gpu or not file.exists():
        return {}
    table = json.loads(file.read_text(encoding="utf-8"))["tiles"]
    return {kernel: {key: Tiles(**tiles) for key, tiles in choices.items()} for kernel, choices in table.items()}
