"""The kernels' benchmark: right references, wrong results refused, figures that say what they are."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.kernels import Benchmark, main
from benchmarks.timing import Timer, summary
from benchmarks.workload import Contender, Work, Workload, errors, leaves, relative_error
from benchmarks.workloads import NAMES, workloads
from fvlm.kernels.query_attention.reference import query_attention_torch

CPU = torch.device("cpu")


def tiny(dtype=torch.float32, names=NAMES):
    return [make() for make in workloads(list(names), dtype, CPU, rehearsed=True)]


def test_every_contender_agrees_with_the_reference():
    """In float32, so that an error in a reference or in a contender's layout cannot hide behind rounding."""
    pytest.importorskip("triton")
    for workload in tiny():
        reference = workload.reference()
        assert all(x.dtype == torch.float64 for x in reference.values())
        for contender in workload.contenders:
            found = errors(contender, reference)
            assert set(found) == set(reference)
            assert max(found.values()) < 2e-6, f"{workload.name}, {contender.name}: {found}"


def test_necessary_work_is_what_the_plain_products_take(monkeypatch):
    """Counted by torch, which keeps attention's scores for the backward pass; by convention they count again there.

    It does not see into the operation that is the CPU's own.
    """
    monkeypatch.setattr("fvlm.kernels.query_attention.op.query_attention_cpu", query_attention_torch)
    for workload in tiny(names=["query_attention", "linear_cross_entropy"]):
        plain = {"query_attention": "torch", "linear_cross_entropy": "torch, labelled rows"}[workload.name.split()[0]]
        [contender] = [each for each in workload.contenders if each.name == plain]
        with FlopCounterMode(display=False) as forward:
            out = contender.forward()
        with FlopCounterMode(display=False) as backward:
            contender.backward(out)
        scores = workload.forward.flops / 2 if plain == "torch" else 0
        assert forward.get_total_flops() == workload.forward.flops
        assert backward.get_total_flops() == workload.backward.flops - scores


def test_causal_attention_counts_the_pairs_that_see_each_other():
    workload = tiny(names=["varlen_attention"])[0]
    q, key, _ = workload.contenders[0].leaves
    bounds = [0, 20, 40]  # the padded contender holds [S, h, L, k]
    padded = workload.contenders[-1].leaves[0]
    lengths = padded.abs().sum((1, 3)).ne(0).sum(1).tolist()
    assert sum(lengths) == bounds[-1]
    pairs = sum(row + 1 for length in lengths for row in range(length))
    assert workload.forward.flops == 2 * 2 * q.shape[1] * q.shape[2] * pairs
    assert workload.backward.flops == 2.5 * workload.forward.flops
    assert workload.forward.bytes == 2 * q.nbytes + 2 * key.nbytes + 4 * q.shape[0] * q.shape[1]


def workload_of(function):
    x, upstream = torch.randn(8, 8, dtype=torch.float64), torch.randn(8, 8, dtype=torch.float64)
    reference = {"out": x.sin(), "d_x": upstream * x.cos()}
    contender = Contender("one", function, leaves(x.float()), upstream.float())
    return Workload("w", torch.float32, Work(1e6, 2e6), Work(3e6, 4e6), lambda: reference, [contender])


class _Forgets(torch.autograd.Function):
    """Leaves one value of its memory as it was."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        out = torch.empty_like(x)
        out.view(-1)[1:] = x.detach().sin().view(-1)[1:]
        return out

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].cos()


@pytest.mark.parametrize(
    "function", [lambda x: x.sin() * 1.001, _Forgets.apply, lambda x: x.sin() + (x - x.detach()) * 0.01]
)
def test_a_wrong_result_gets_no_time(function):
    benchmark = Benchmark(Timer(CPU, 1), rehearsed=True)
    benchmark.run(workload_of(function))
    assert len(benchmark.wrong) == 1
    assert benchmark.rows == []
    assert [name for name in benchmark.figures if "_ms" in name] == []


def test_figures_of_a_right_result():
    benchmark = Benchmark(Timer(CPU, 3), rehearsed=True)
    benchmark.run(workload_of(torch.sin))
    assert benchmark.wrong == []
    assert [row["pass"] for row in benchmark.rows] == ["forward", "backward", "both"]
    figures = benchmark.figures
    for phase, work in (("forward", Work(1e6, 2e6)), ("backward", Work(3e6, 4e6)), ("both", Work(4e6, 6e6))):
        seconds = figures[f"w/one/{phase}/called_ms"] / 1e3
        assert figures[f"w/one/{phase}/tflop_per_s"] == pytest.approx(work.flops / seconds / 1e12)
        assert figures[f"w/one/{phase}/gb_per_s"] == pytest.approx(work.bytes / seconds / 1e9)
        of_copy = figures[f"w/one/{phase}/gb_per_s"] / figures["copy_gb_per_s"]
        assert figures[f"w/one/{phase}/of_copy_rate"] == pytest.approx(of_copy)
        assert f"w/one/{phase}/kernels_ms" not in figures


def test_errors_are_relative_and_never_hide_what_is_not_finite():
    x = torch.randn(100, dtype=torch.float64)
    assert relative_error(x * 1.01, x) == pytest.approx(0.01)
    assert relative_error(x[1:], x) == float("inf")
    for bad in (float("nan"), float("inf")):
        assert relative_error(torch.where(torch.arange(100) == 7, bad, x), x) == float("inf")
    assert relative_error(torch.full((3,), 0.5), torch.zeros(3)) > 0.5


def test_quantiles_and_untimed_preparation():
    assert summary([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == pytest.approx((3.5, 2.0, 5.0))
    prepared, seen = iter(range(10)), []
    Timer(CPU, 4).called(seen.append, prepare=lambda: next(prepared))
    assert seen == [0, 1, 2, 3]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("tune", [[], ["--tune"]])
def test_without_a_gpu_it_says_so(tune, capsys, tmp_path):
    assert main([*tune, "--json", str(tmp_path / "file.json")]) == 1
    assert "no CUDA device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_rehearsal_runs_the_command_and_says_that_times_mean_nothing(repo_root, tmp_path):
    pytest.importorskip("triton")
    results = repo_root / "benchmarks" / "results"
    before = {file: file.stat().st_mtime_ns for file in results.rglob("*")}
    command = [sys.executable, "-m", "benchmarks.kernels", "--rehearse", "--op", "query_attention"]
    done = subprocess.run(
        [*command, "--json", tmp_path / "k.json"], cwd=repo_root, capture_output=True, text=True, check=True
    )
    assert "times mean nothing" in done.stdout
    contents = json.loads((tmp_path / "k.json").read_text())
    assert contents["rehearsal"] is True
    timed = {tuple(name.split("/")[1:3]) for name in contents["figures"] if name.endswith("/called_ms")}
    names = ("triton", "torch", "sdpa", "sdpa, gathered")
    assert timed == {(name, phase) for name in names for phase in ("forward", "backward", "both")}
    assert {file: file.stat().st_mtime_ns for file in results.rglob("*")} == before
