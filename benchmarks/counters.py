"""What steady steps should not do: compile, make the host wait for the device, and launch more than they have to.

Counting takes time, so steps that are counted are not the steps that are timed.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import warnings
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters as dynamo_counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.environment import ROOT

WARNING = "called a synchronizing CUDA operation"
LAUNCHES = re.compile(r"cu(da)?(LaunchKernel|LaunchCooperativeKernel|GraphLaunch)")
"""Calls of CUDA's runtime and driver that put work on the device; a replayed graph is one."""
CPU_ONLY = "cpu only: "
_CPU_CODE = re.compile(r"fvlm/kernels/\w+/(cpu|reference)\.py:.*|.*: without_unused")
_ENGINE = str(Path(importlib.util.find_spec("deepspeed").origin).parent) + "/"
_OURS = f"{ROOT}/"
_INSTALLED = re.compile(r"/(\.venv|build|site-packages)/")


class HostSyncs(Counter):
    """Where in the source the host waited for the device (`path:line: operation`) → how often."""

    @property
    def ours(self) -> dict[str, int]:
        """Those whose innermost frame, of the repository's and DeepSpeed's, is the repository's."""
        others = ("deepspeed/", "elsewhere", CPU_ONLY)
        return {where: count for where, count in self.items() if not where.startswith(others)}

    @property
    def engine(self) -> dict[str, int]:
        """Those whose innermost frame is DeepSpeed's."""
        return {where: count for where, count in self.items() if where.startswith("deepspeed/")}

    @property
    def cpu_only(self) -> dict[str, int]:
        """Those in code that runs on the CPU only: the kernels' back ends for it, and packs cut to what is used."""
        return {where: count for where, count in self.items() if where.startswith(CPU_ONLY)}

    def add_on_cpu(self, operation: str) -> None:
        """Count one, caused by the current stack, of a run on the CPU."""
        place, function = _place()
        self[f"{CPU_ONLY * bool(_CPU_CODE.fullmatch(f'{place}: {function}'))}{place}: {operation}"] += 1


class SteadyState:
    """Counts while steps run within; read the figures afterwards.

    On CUDA the host's waits are those that torch itself reports (`torch.cuda.set_sync_debug_mode`): torch passes on
    what it finds in the backward pass's threads when the pass is over, so that it is attributed to who called it; waits
    for a whole stream or event are not reported. On the CPU they are the operations that would wait on CUDA
    (`WouldWait`): an upper bound, since a tensor that would stay on the host counts like any other.
    """

    def __init__(self, device: torch.device | str | None = None):
        """`device`: where the steps run; None: on the GPU if there is one."""
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.recompilations = 0
        """Frames that torch.compile compiled anew, and Triton kernels that were compiled."""
        self.host_syncs = HostSyncs()
        self.launches: int | None = None
        """Kernels and graphs that were put on the device; None on the CPU."""

    def __enter__(self) -> SteadyState:
        self._stack = ExitStack()
        self._frames = dynamo_counters["frames"]["total"]
        self._listen_to_triton()
        if self.device.type == "cuda":
            self._count_on_cuda()
        else:
            _listen_to_python(self.host_syncs, self._stack)
            self._stack.enter_context(WouldWait(self.host_syncs))
        return self

    def __exit__(self, *raised: object) -> None:
        self._stack.__exit__(*raised)
        self.recompilations += dynamo_counters["frames"]["total"] - self._frames

    def _listen_to_triton(self) -> None:
        if importlib.util.find_spec("triton") is None:
            return
        from triton import knobs

        def compiled(**_: Any) -> None:
            self.recompilations += 1

        before, knobs.runtime.jit_post_compile_hook = knobs.runtime.jit_post_compile_hook, compiled
        self._stack.callback(setattr, knobs.runtime, "jit_post_compile_hook", before)

    def _count_on_cuda(self) -> None:
        profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])

        def count_launches() -> None:
            profiler.stop()
            self.launches = sum(bool(LAUNCHES.match(event.name)) for event in profiler.events())

        def show(message: Warning, category: type, filename: str, lineno: int, file: Any = None, line: Any = None):
            if WARNING in str(message):
                self.host_syncs[f"{_place()[0]}: {Path(filename).name}:{lineno}"] += 1
            else:
                shown(message, category, filename, lineno, file, line)

        profiler.start()
        self._stack.callback(count_launches)
        self._stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("always", WARNING)
        shown, warnings.showwarning = warnings.showwarning, show
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn")
        self._stack.callback(torch.cuda.set_sync_debug_mode, before)


class WouldWait(TorchDispatchMode):
    """Counts operations on the CPU for which the host would wait on CUDA: their results' shapes or values need data."""

    def __init__(self, found: HostSyncs):
        super().__init__()
        self.found = found

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Functions are compiled as without this mode, which sees what the compiled ones call."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in _WAITING or (name in _INDEXED and _finds_rows(name, args)):
            self.found.add_on_cpu(name.removeprefix("_"))
        return func(*args, **(kwargs or {}))


def _listen_to_python(found: HostSyncs, stack: ExitStack) -> None:
    """Count what reaches no dispatcher on the CPU: values that Python takes from a tensor, or gives to a new one.

    The methods are replaced for a while: a torch function mode would have every compiled frame compiled again.
    """
    for owner, name in _TAKERS + _MAKERS:
        function, inherited = getattr(owner, name), name not in vars(owner)

        def counting(first: Any, *args: Any, _call: Any = function, _of: Any = (owner, name), **kwargs: Any) -> Any:
            gives = kwargs.get("device") is not None and not isinstance(first, Tensor)
            if _of in _TAKERS or gives:
                found.add_on_cpu(_of[1])
            return _call(first, *args, **kwargs)

        setattr(owner, name, counting)
        stack.callback(*((delattr, owner, name) if inherited else (setattr, owner, name, function)))


_WAITING = {
    "_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "_unique", "_unique2", "unique_dim",
    "unique_consecutive", "unique_dim_consecutive", "bincount", "_pin_memory",
}  # fmt: skip
_INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "repeat_interleave"}
_TAKERS = ((Tensor, "tolist"), (Tensor, "numpy"), (Tensor, "cpu"))
_MAKERS = ((torch, "tensor"), (torch, "as_tensor"))


def _finds_rows(name: str, args: Any) -> bool:
    """Whether an operation has to find out how many rows are meant."""
    if name == "repeat_interleave":  # the tensor of repeats alone; with `output_size` torch calls another way
        return len(args) == 1
    masks = [x for x in tree_leaves(args[1]) if isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8)]
    fills = name != "index" and args[2].numel() == 1  # becomes masked_fill
    return bool(masks) and not fills


def _place() -> tuple[str, str]:
    """`path:line` and the function of the innermost frame that is the repository's or DeepSpeed's."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_ENGINE):
            return f"deepspeed/{file.removeprefix(_ENGINE)}:{frame.f_lineno}", frame.f_code.co_name
        if file.startswith(_OURS) and file != __file__ and not _INSTALLED.search(file.removeprefix(str(ROOT))):
            return f"{file.removeprefix(_OURS)}:{frame.f_lineno}", frame.f_code.co_name
        frame = frame.f_back
    return "elsewhere", ""
