"""The profile: phases get the time that is spent in them, forward and backward, and the GPU's part is read right."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import time

import pytest
import torch
from torch.profiler import ProfilerActivity, record_function
from torch.utils.checkpoint import checkpoint

from benchmarks import profile
from benchmarks.profile_trace import DRAIN, FORWARD, PHASE, STEP, read_trace


class Sleeps(torch.autograd.Function):
    """Takes the given seconds in each direction."""

    @staticmethod
    def forward(ctx, x, ahead, back):
        ctx.seconds = back
        time.sleep(ahead)
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(ctx.seconds)
        return gradient, None, None


def test_backward_phases_are_those_of_the_forward_pass_recomputed_ones_too(tmp_path):
    """Known times under custom autograd and recomputation: 20 ms back through the encoder, 30 + 50 through the LLM."""
    weight = torch.ones(4, requires_grad=True)

    def step():
        with record_function(PHASE + "encoder"):
            x = Sleeps.apply(weight, 0.0, 0.02)
        with record_function(PHASE + "fine LLM"):
            x = checkpoint(lambda y: Sleeps.apply(y, 0.03, 0.05).relu(), x, use_reentrant=False)
        with record_function(PHASE + "head"):
            loss = Sleeps.apply(x, 0.01, 0.0).sum()
        loss.backward()

    step()
    with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(2):
            with record_function(STEP):
                step()
    profiler.export_chrome_trace(str(tmp_path / "trace.json.gz"))
    reading = read_trace(tmp_path / "trace.json.gz")
    assert reading.steps == 2
    host = {phase: ms / 2 for phase, ms in reading.host.items()}
    slept = {"encoder": 0, "fine LLM": 30, "head": 10, "backward of head": 0, "backward of fine LLM": 80,
             "backward of encoder": 20}  # fmt: skip
    for phase, milliseconds in slept.items():  # what one phase has too much, another lacks
        assert milliseconds <= host[phase], (phase, host)
    assert sum(host.values()) == pytest.approx(reading.wall / 2)
    assert reading.idle_share is None


def event(category, name, start, length, thread=1, **arguments):
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": length, "tid": thread, "args": arguments}


def test_a_gpus_work_belongs_to_the_phase_that_launched_it(tmp_path):
    """Two threads, one kernel of each kind, a copy beside a kernel, and a kernel that starts after its step."""
    node = "autograd::engine::evaluate_function: "
    events = [
        event("kernel", "too early", 0, 50, 7, correlation=1),
        event("user_annotation", STEP, 1000, 1000),
        event("user_annotation", PHASE + "encoder", 1000, 200),
        event("cpu_op", "aten::mm", 1010, 100, **{"Sequence number": 5, "Fwd thread id": 0}),
        event("cuda_runtime", "cudaLaunchKernel", 1020, 10, correlation=2),
        event("kernel", "gemm", 1100, 400, 7, correlation=2),
        event("cuda_runtime", "cudaMemcpyAsync", 1150, 10, correlation=3),
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 1400, 200, 8, correlation=3),
        event("cpu_op", node + "MmBackward0", 1300, 300, 2, **{"Sequence number": 5, "Fwd thread id": 1}),
        event("cuda_driver", "cuLaunchKernelEx", 1320, 10, 2, correlation=4),
        event("kernel", "gemm", 1700, 100, 7, correlation=4),
        event("cpu_op", node + "torch::autograd::AccumulateGrad", 1610, 50, 2),
        event("cpu_op", "c10d::allreduce_", 1620, 20, 2),
        event("cuda_runtime", "cudaLaunchKernelExC", 1625, 5, 2, correlation=5),
        event("kernel", "ncclDevKernel_AllReduce", 2100, 300, 7, correlation=5),
        event("gpu_user_annotation", STEP, 1100, 1300, 7),
        event("user_annotation", DRAIN, 2000, 1000),
    ]
    (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": events}))
    reading = read_trace(tmp_path / "trace.json")
    assert reading.device == {"encoder": 0.4, "copy": 0.2, "backward of encoder": 0.1, "communication": 0.3}
    assert reading.kernels == {"gemm": 0.5, "Memcpy HtoD (Pinned -> Device)": 0.2, "ncclDevKernel_AllReduce": 0.3}
    assert reading.wall == 2.0
    assert reading.busy == pytest.approx(0.5 + 0.1 + 0.3)
    assert reading.idle_share == pytest.approx(1 - 0.9 / 2)
    assert reading.launches == 3
    assert reading.host == pytest.approx(
        {"encoder": 0.2, "backward of encoder": 0.3, "gradients": 0.03, "communication": 0.02, "rest": 1.45}
    )
    page = profile.summary(reading, "title")
    assert "idle for 55.0%" in page
    assert "| backward of encoder | 0.30 | 15.0% | 0.10 | 10.0% |" in page
    assert "| gemm | 0.500 | 50.0% | 2 |" in page


def test_a_trace_of_something_else_is_refused(tmp_path, capsys):
    (tmp_path / "other.json.gz").write_bytes(gzip.compress(b'{"traceEvents": []}'))
    assert profile.main(["--read", str(tmp_path / "other.json.gz")]) == 1
    assert "other.json.gz: no range named 'fvlm step'" in capsys.readouterr().err
    assert profile.main(["--steps", "0"]) == 2


@pytest.mark.slow
def test_run_as_a_script_it_does_not_pass_for_pythons_own_profile(repo_root):
    """torch imports cProfile, which imports `profile`."""
    command = [sys.executable, repo_root / "benchmarks" / "profile.py", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Perfetto" in done.stdout


def test_phases_of_real_steps_make_up_their_time(tmp_path, monkeypatch, capsys):
    measured = []

    def clocked(product, steps, trace):
        step = product.step

        def timed():
            begin = time.perf_counter()
            done = step()
            measured.append(time.perf_counter() - begin)
            return done

        product.step = timed
        traced(product, steps, trace)

    traced = profile.trace_steps
    monkeypatch.setattr(profile, "trace_steps", clocked)
    out = tmp_path / "out"
    arguments = ["--model", "tiny", "--steps", "2", "--samples", "150", "--out", str(out)]
    assert profile.main([*arguments, "--json", str(tmp_path / "r.json"), "data.tokens=512", "data.longest=256"]) == 0
    figures = json.loads((tmp_path / "r.json").read_text())["figures"]
    wall = 1e3 * sum(measured[profile.WARM_UP :]) / 2
    assert figures["step_ms"] == pytest.approx(wall, rel=0.05)
    phases = {name: ms for name, ms in figures.items() if name.startswith("host_")}
    assert sum(phases.values()) == pytest.approx(wall, rel=0.05)
    for phase in FORWARD:
        slug = phase.replace(" ", "_").lower()
        assert 0 < figures[f"host_{slug}_ms"] < wall
        assert 0 < figures[f"host_backward_of_{slug}_ms"] < wall
    assert figures["host_load_ms"] > 0
    assert figures["host_optimizer_ms"] > 0
    assert figures["host_rest_ms"] < 0.25 * wall
    assert "backward of fine LLM" in (out / "summary.md").read_text()
    assert f"trace and summary in {out}" in capsys.readouterr().out
