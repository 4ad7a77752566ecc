"""Counters of steady steps: what is planted is found, at its line and with the one who caused it."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path

import pytest
import torch

from benchmarks import counters
from benchmarks.counters import SteadyState

HERE = "tests/benchmarks/test_counters.py"


def line_of(function, text: str) -> int:
    lines, first = inspect.getsourcelines(function)
    return next(first + number for number, line in enumerate(lines) if text in line)


def planted(x: torch.Tensor) -> None:
    x.sum().item()
    x[x > 0]  # rows
    x.nonzero()
    torch.unique(x)
    torch.equal(x, x)
    x.tolist()
    if x.sum() > 0:
        x.masked_select(x > 1)
    torch.tensor([1.0], device=x.device)
    torch.repeat_interleave(x, torch.tensor([1, 2, 3, 4]))


def harmless(x: torch.Tensor) -> None:
    y = x.clone()
    y[x > 0] = 0.0
    y[:2] += x[torch.tensor([0, 1])]
    torch.where(x > 0, x, y).sum().backward()
    torch.repeat_interleave(x, 2)


def test_what_is_planted_is_found_at_its_line():
    with SteadyState("cpu") as counted:
        planted(torch.arange(4.0))
    marks = [".item()", "# rows", ".nonzero", "torch.unique", "torch.equal", ".tolist", "if x.sum",
             "masked_select", "device=", "repeat_interleave"]  # fmt: skip
    lines = {f"{HERE}:{line_of(planted, mark)}" for mark in marks}
    assert {where.rsplit(": ", 1)[0] for where in counted.host_syncs.ours} == lines
    assert set(counted.host_syncs.values()) == {1}
    assert counted.host_syncs.engine == {}
    assert counted.launches is None


def test_what_does_not_wait_is_not_counted():
    with SteadyState("cpu") as counted:
        harmless(torch.arange(4.0, requires_grad=True))
    assert counted.host_syncs == {}
    assert counted.recompilations == 0


def test_the_engines_own_are_told_apart():
    from deepspeed.runtime.utils import get_global_norm_of_tensors

    with SteadyState("cpu") as counted:
        get_global_norm_of_tensors([torch.ones(2)], 2)
    assert counted.host_syncs.ours == {}
    assert all(where.startswith("deepspeed/runtime/utils.py:") for where in counted.host_syncs.engine)
    assert sum(counted.host_syncs.engine.values()) == 1


def test_what_only_the_cpus_kernels_do_is_set_apart(repo_root):
    file = f"{repo_root}/fvlm/kernels/varlen_attention/cpu.py"
    names = {"x": torch.ones(1)}
    with SteadyState("cpu") as counted:
        exec(compile("x.tolist()", file, "exec"), names)
    assert counted.host_syncs.cpu_only == {"cpu only: fvlm/kernels/varlen_attention/cpu.py:1: tolist": 1}
    assert counted.host_syncs.ours == {}


def test_waits_within_a_backward_pass_belong_to_its_function():
    class Waits(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            gradient.sum().item()
            return gradient

    x = torch.ones(2, requires_grad=True)
    with SteadyState("cpu") as counted:
        Waits.apply(x).sum().backward()
    line = line_of(Waits.backward, ".item()")
    assert counted.host_syncs == {f"{HERE}:{line}: local_scalar_dense": 1}


def test_compiling_within_is_counted_and_running_what_is_compiled_is_not():
    @torch.compile(backend="eager", dynamic=False)
    def double(x):
        return x * 2

    double(torch.ones(2))
    with SteadyState("cpu") as counted:
        double(torch.ones(2))
    assert counted.recompilations == 0
    with SteadyState("cpu") as counted:
        double(torch.ones(3))
        double(torch.ones(3))
    assert counted.recompilations == 1


def test_on_cuda_torchs_warnings_are_counted_and_others_pass(monkeypatch):
    """The path of a GPU, with what CUDA would say said by hand."""
    modes = ["default"]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(counters.torch.profiler, "profile", lambda activities: Profiler())

    def waits():
        warnings.warn("called a synchronizing CUDA operation", UserWarning, stacklevel=1)

    def steps():
        with SteadyState("cuda") as counted:
            waits()
            waits()
            warnings.warn("another", UserWarning, stacklevel=1)
        return counted

    with pytest.warns(UserWarning, match="another") as others:
        counted = steps()
    line = line_of(waits, "warnings.warn")
    name = Path(__file__).name
    assert counted.host_syncs == {f"{HERE}:{line}: {name}:{line}": 2}
    assert [str(w.message) for w in others] == ["another"]
    assert modes == ["default", "warn", 0]
    assert counted.launches == 3


class Profiler:
    """What torch's would have seen."""

    def start(self):
        pass

    def stop(self):
        pass

    def events(self):
        class Event:
            def __init__(self, name):
                self.name = name

        return map(Event, ["cudaLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch", "cudaMemcpyAsync", "void gemm"])


@pytest.mark.gpu
def test_on_a_gpu_both_are_found():
    x = torch.ones(4, device="cuda")
    with SteadyState() as counted:
        (x + 1).sum().item()
    assert sum(counted.host_syncs.ours.values()) == counted.host_syncs.total() == 1
    assert counted.launches >= 2
