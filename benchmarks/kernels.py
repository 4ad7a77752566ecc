"""Command: every kernel against its back ends, on a GPU."""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import kernels_tune
from benchmarks.environment import RESULTS, fail, markdown_table, record, write_json
from benchmarks.timing import Timer, Times, capture
from benchmarks.workload import LIMITS, Contender, Work, Workload, errors
from benchmarks.workloads import MODULES, NAMES, workloads
from fvlm.kernels import launching

DESCRIPTION = """Time every kernel against its back ends on a GPU: forward, backward, both.

Each contender's results are checked against float64 first; who is wrong gets no time, and the exit code is 1. Times
are medians (p20-p80) with a cold L2: of the kernels alone (CUDA graph replay), and as called, launches included. Rates
count the work that is necessary, whoever does it; the roof is the slower of moving its bytes at the copy rate and doing
its products at the GEMM rate, both measured in the same run. Extra memory is the peak beyond inputs and outputs.

examples:
  python -m benchmarks.kernels                        writes benchmarks/results/kernels-<GPU>.json
  python -m benchmarks.kernels --op query_attention --runs 50
  python -m benchmarks.kernels --tune                 searches tiles, writes kernels/tuned/<GPU>.json
  python -m benchmarks.kernels --rehearse             tiny, on the CPU: shows that the command works, times mean nothing
"""
DTYPE = torch.bfloat16
PHASES = ("forward", "backward", "both")


class Benchmark:
    """Measures workloads and collects figures, rows and what went wrong."""

    def __init__(self, timer: Timer, rehearsed: bool):
        self.timer = timer
        self.figures: dict[str, Any] = {
            "copy_gb_per_s": timer.copy_rate(8 if rehearsed else 2048),
            "gemm_tflop_per_s": timer.gemm_rate(256 if rehearsed else 8192),
        }
        self.rows: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.wrong: list[str] = []

    def run(self, workload: Workload) -> None:
        """Check and time every contender."""
        reference = workload.reference()
        for contender in workload.contenders:
            name = f"{workload.name}/{contender.name}"
            try:
                found = errors(contender, reference)
                over = {what: error for what, error in found.items() if not error <= LIMITS[workload.dtype]}
                if over:
                    self.wrong.append(f"{name}: beyond {LIMITS[workload.dtype]}: {over}")
                    continue
                self.figures |= {f"{name}/error/{what}": error for what, error in found.items()}
                self._time(name, workload, contender)
            except torch.cuda.OutOfMemoryError:
                self.notes.append(f"{name}: out of memory")

    def _time(self, name: str, workload: Workload, contender: Contender) -> None:
        called, alone = self._called(contender), self._alone(name, contender)
        memory = {
            "forward": self.timer.extra_memory(lambda: (contender.forward(),)),
            "both": self.timer.extra_memory(contender.both),
        }
        for phase in PHASES:
            figures = times("called_ms", called[phase])
            if alone:
                figures |= times("kernels_ms", alone[phase])
            figures |= self._rates(_work(workload, phase), (alone or called)[phase].median)
            if memory.get(phase) is not None:
                figures["extra_mib"] = memory[phase] / 2**20
            self.figures |= {f"{name}/{phase}/{key}": value for key, value in figures.items()}
            self.rows.append(_row(workload.name, contender.name, phase, figures))

    def _called(self, contender: Contender) -> dict[str, Times]:
        return {
            "forward": self.timer.called(lambda _: contender.forward()),
            "backward": self.timer.called(contender.backward, prepare=contender.forward),
            "both": self.timer.called(lambda _: contender.both()),
        }

    def _alone(self, name: str, contender: Contender) -> dict[str, Times] | None:
        """Without launch overhead; None on the CPU and where a graph cannot hold what the contender does."""
        if not self.timer.cuda:
            return None
        try:
            forward, backward = capture(lambda _: contender.forward(), contender.backward)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.notes.append(f"{name}: not captured as a CUDA graph: {str(error).splitlines()[0]}")
            return None
        return {
            "forward": self.timer.replayed(forward),
            "backward": self.timer.replayed(backward, before=forward),
            "both": self.timer.replayed(forward, backward),
        }

    def _rates(self, work: Work, milliseconds: float) -> dict[str, float]:
        tflops, gbps = work.flops / milliseconds / 1e9, work.bytes / milliseconds / 1e6
        of_gemm, of_copy = tflops / self.figures["gemm_tflop_per_s"], gbps / self.figures["copy_gb_per_s"]
        return {
            "tflop_per_s": tflops,
            "gb_per_s": gbps,
            "of_gemm_rate": of_gemm,
            "of_copy_rate": of_copy,
            "of_roof": max(of_gemm, of_copy),
        }


def times(name: str, measured: Times) -> dict[str, float]:
    """As figures hold them."""
    return {name: measured.median, f"{name}_p20": measured.p20, f"{name}_p80": measured.p80}


def _work(workload: Workload, phase: str) -> Work:
    return {
        "forward": workload.forward,
        "backward": workload.backward,
        "both": workload.forward + workload.backward,
    }[phase]


def _row(workload: str, contender: str, phase: str, figures: dict[str, float]) -> dict[str, Any]:
    def spread(name: str) -> str | None:
        if name not in figures:
            return None
        return f"{figures[name]:.3f} ({figures[name + '_p20']:.3f}-{figures[name + '_p80']:.3f})"

    bound = f"{figures['tflop_per_s']:.1f} TFLOP/s"
    if figures["of_copy_rate"] > figures["of_gemm_rate"]:
        bound = f"{figures['gb_per_s']:.0f} GB/s"
    return {
        "workload": workload,
        "by": contender,
        "pass": phase,
        "kernels, ms": spread("kernels_ms"),
        "called, ms": spread("called_ms"),
        "necessary work": bound,
        "of roof": f"{figures['of_roof']:.0%}",
        "extra MiB": f"{figures['extra_mib']:.1f}" if "extra_mib" in figures else None,
    }


def measure(names: list[str], timer: Timer, rehearsed: bool, save: Any) -> Benchmark:
    """Run the workloads one after the other; ``save`` is called after each, so that a late failure costs little."""
    benchmark = Benchmark(timer, rehearsed)
    makers = list(workloads(names, DTYPE, timer.device, rehearsed))
    for make in tqdm(makers, desc="kernels", unit="workload", file=sys.stderr):
        benchmark.run(make())
        gc.collect()
        if timer.cuda:
            torch.cuda.empty_cache()
        save(benchmark)
    return benchmark


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--op", nargs="+", choices=NAMES, default=list(NAMES), help="default all")
    parser.add_argument("--runs", type=int, default=30, help="timed runs of each (default 30)")
    parser.add_argument("--tune", action="store_true", help="search the tiles of each kernel for this GPU instead")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU; writes only where --json says")
    parser.add_argument("--json", type=Path, help="file to write (default: see the examples)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 done, 1 no GPU or a wrong result, 2 wrong usage."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    asked = parse(arguments)
    if asked.rehearse and not launching.interpreted():
        return _interpreted(arguments)
    if asked.rehearse:
        print("Rehearsal on the CPU, kernels in Triton's interpreter: its times mean nothing.")
    elif not torch.cuda.is_available():
        return fail("no CUDA device: times need a GPU (--rehearse shows on the CPU that the command works)")
    elif launching.interpreted():
        return fail("TRITON_INTERPRET is set: unset it, or kernels would run in Triton's interpreter")
    timer = Timer(torch.device("cpu" if asked.rehearse else "cuda"), 1 if asked.rehearse else asked.runs)
    slug = "rehearsal" if asked.rehearse else launching.gpu_slug(torch.cuda.get_device_name())
    return (_tune if asked.tune else _compare)(asked, arguments, timer, slug)


def _interpreted(arguments: Sequence[str]) -> int:
    """The same command in a process of its own: Triton reads the setting when it is first imported."""
    command = [sys.executable, "-m", "benchmarks.kernels", *arguments]
    return subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, check=False).returncode


def _compare(asked: argparse.Namespace, arguments: Sequence[str], timer: Timer, slug: str) -> int:
    file = asked.json or (None if asked.rehearse else RESULTS / f"kernels-{slug}.json")
    tuned = launching.TUNED / f"{slug}.json"
    tiles = json.loads(tuned.read_text(encoding="utf-8"))["tiles"] if tuned.exists() else "defaults"

    def save(benchmark: Benchmark) -> None:
        if file is not None:
            more = {"rehearsal": asked.rehearse, "tiles": tiles, "notes": benchmark.notes + benchmark.wrong}
            write_json(file, record("benchmarks.kernels", arguments, benchmark.figures, **more))

    benchmark = measure(asked.op, timer, asked.rehearse, save)
    rates = f"{benchmark.figures['copy_gb_per_s']:.0f} GB/s, {benchmark.figures['gemm_tflop_per_s']:.1f} TFLOP/s"
    print(f"{slug}: copy and GEMM rate {rates}; {'default' if tiles == 'defaults' else 'tuned'} tiles\n")
    print(markdown_table(benchmark.rows))
    print("\n".join(["", *(f"note: {note}" for note in benchmark.notes), f"written to {file}" if file else ""]))
    return fail("\n".join(["wrong results, not timed:", *benchmark.wrong])) if benchmark.wrong else 0


def _tune(asked: argparse.Namespace, arguments: Sequence[str], timer: Timer, slug: str) -> int:
    file = asked.json or (None if asked.rehearse else launching.TUNED / f"{slug}.json")
    ops = [name for name in asked.op if name in MODULES]
    if timer.cuda:
        kernels_tune.compile_for(timer.device, ops)
    tried = kernels_tune.search(ops, timer, asked.rehearse)
    table = kernels_tune.winners(tried)
    print(markdown_table(kernels_tune.rows(tried, table)))
    if file is not None:
        figures, tiles = kernels_tune.figures(tried), kernels_tune.merged(file, table)
        write_json(file, record("benchmarks.kernels", arguments, figures, tiles=tiles, rehearsal=asked.rehearse))
        print(f"\nwritten to {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
