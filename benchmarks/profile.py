"""Where the time of a training step goes: by phase and by kernel, with a trace for Perfetto.

python benchmarks/profile.py --model 135m --mix stage2                    (on a GPU)
python -m benchmarks.profile --model tiny --steps 3 data.tokens=512       (on a CPU)
python -m benchmarks.profile --read runs/profile-135m-stage2/trace.json.gz

Steps of the product's own loader, loop and engine on drawn samples and random weights (benchmarks/mixes.py). The folder
--out gets trace.json.gz (open it at https://ui.perfetto.dev, or in chrome://tracing) and summary.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

# Run as a script, this folder is where Python looks first, and this file would pass for the standard library's
# `profile`, which torch imports.
if sys.path[0] == str(Path(__file__).resolve().parent):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, record_function

from benchmarks import mixes
from benchmarks.environment import RESULTS, fail, markdown_table, processor_slug, record, write_json
from benchmarks.profile_trace import DRAIN, FORWARD, ORDER, PHASE, REST, STEP, WAIT, Reading, read_trace
from benchmarks.throughput_contenders import Product, Setting
from fvlm.schema import ConfigError
from fvlm.train.engine import start_ranks, stop_ranks

WARM_UP = 2
TOP = 25
SMALL = ("data.tokens=1024", "train.packs_per_step=2", "data.num_workers=0")
"""What a CPU runs instead of the stage's own packs; given overrides come after it."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=mixes.MODELS, default="135m")
    parser.add_argument("--mix", choices=list(mixes.STAGES), default="stage2")
    parser.add_argument("--steps", type=int, default=3, help="steps that are recorded; default %(default)s")
    parser.add_argument("--samples", type=int, default=4096, help="samples to draw")
    parser.add_argument("--zero", default="zero1", help="DeepSpeed JSON, by name or path")
    parser.add_argument("--out", type=Path, help="folder for trace and summary; default runs/profile-<model>-<mix>")
    parser.add_argument("--json", type=Path, help="result file; default benchmarks/results/profile-<what>.json")
    parser.add_argument("--read", type=Path, metavar="TRACE", help="only summarise this trace, to standard output")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the run, e.g. data.tokens=8192")
    return parser.parse_intermixed_args(arguments)


def put_ranges(product: Product) -> None:
    """Mark the phases of every later step, by replacing methods of these objects."""
    engine, trainer = product.engine, product.trainer
    model = engine.module
    methods = [
        (model.encoder, "forward", "encoder"),
        (model.encoder, "look", "queries"),
        (model, "prefix_hidden_states", "coarse LLM"),
        (model, "write_queries", "queries"),
        (model, "to_llm", "queries"),
        (model, "hidden_states", "fine LLM"),
        (model, "_loss", "head"),
        (engine, "step", "optimizer"),
        (engine.world, "sum", "communication"),
        (trainer, "settle", WAIT),
        (trainer, "advance", REST),
    ]
    for owner, name, phase in methods:
        object.__setattr__(owner, name, _ranged(getattr(owner, name), phase))  # the world is frozen


def _ranged(function: Callable, phase: str) -> Callable:
    def ranged(*args: Any, **kwargs: Any) -> Any:
        with record_function(PHASE + phase):
            return function(*args, **kwargs)

    return ranged


def trace_steps(product: Product, steps: int, trace: Path) -> None:
    """Record steps, after some that are not recorded, and write the trace."""
    for _ in range(WARM_UP):
        product.step()
    put_ranges(product)
    on_gpu = product.engine.world.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    _wait(product)
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(steps):
            with record_function(STEP), record_function(PHASE + "load"):  # all of a step that `advance` is not
                product.step()
        with record_function(DRAIN), record_function(PHASE + WAIT):
            _wait(product)
    trace.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(trace))


def _wait(product: Product) -> None:
    product.finish()
    if product.engine.world.device.type == "cuda":
        torch.cuda.synchronize()


def figures_of(reading: Reading) -> dict[str, float]:
    """Flat, a step's means."""
    count = reading.steps
    figures = {"step_ms": reading.wall / count}
    figures |= {f"host_{_slug(phase)}_ms": reading.host[phase] / count for phase in ORDER if phase in reading.host}
    figures |= {
        f"device_{_slug(phase)}_ms": reading.device[phase] / count for phase in ORDER if phase in reading.device
    }
    if reading.idle_share is not None:
        figures |= {"gpu_idle_share": reading.idle_share, "launches": reading.launches / count}
    return figures


def _slug(phase: str) -> str:
    return phase.replace(" ", "_").lower()


def summary(reading: Reading, title: str) -> str:
    """One page."""
    count, wall = reading.steps, reading.wall
    device = reading.device.total()
    rows = []
    for phase in (name for name in ORDER if reading.host[name] or reading.device[name]):
        row = {"phase": phase, "host, ms": f"{reading.host[phase] / count:.2f}",
               "of the step": f"{reading.host[phase] / wall:.1%}"}  # fmt: skip
        if device:
            row |= {
                "device, ms": f"{reading.device[phase] / count:.2f}",
                "of its work": f"{reading.device[phase] / device:.1%}",
            }
        rows.append(row)
    kernels = [
        {"kernel" if device else "operation": name[:90].replace("|", "/"), "ms": f"{ms / count:.3f}",
         "share": f"{ms / reading.kernels.total():.1%}", "calls": f"{reading.calls[name] / count:.0f}"}
        for name, ms in reading.kernels.most_common(TOP)
    ]  # fmt: skip
    lines = [f"# {title}", "", f"{count} steps of {wall / count:.1f} ms; everything is per step, with the profiler on."]
    if device:
        lines += [
            f"The GPU was idle for {reading.idle_share:.1%} of the time, and {reading.launches / count:.0f} kernels or "
            f"graphs were launched."
        ]
    lines += ["", "## By phase", "", markdown_table(rows), ""]
    lines += [
        f"## The {len(kernels)} {'kernels' if device else 'operations'} that take most",
        "",
        markdown_table(kernels),
    ]
    return "\n".join(lines) + "\n"


def profile(args: argparse.Namespace, folder: Path, out: Path) -> tuple[Reading, dict[str, Any]]:
    """Draw into `folder`, run, record into `out`; also returns what was run."""
    world = start_ranks()
    small = SMALL if world.device.type == "cpu" else ()
    workload = mixes.make_workload(
        folder, args.model, args.mix, num_samples=args.samples, overrides=[*small, *args.overrides]
    )
    reference = np.zeros((len(workload.data.table), 2), np.float32) if args.mix == "dpo" else None
    product = Product(workload, Setting(zero=args.zero), world, reference)
    try:
        trace_steps(product, args.steps, out / "trace.json.gz")
    finally:
        product.close()
        stop_ranks()
    capacities = workload.data.plan.capacities
    what = {"frames": capacities.frames, "tokens": capacities.tokens, "packs": workload.config.train.packs_per_step}
    return read_trace(out / "trace.json.gz"), what


def main(arguments: list[str] | None = None) -> int:
    """Profile and summarise; 0 done, 1 failed, 2 wrong usage."""
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parse(arguments)
    if args.steps < 1:
        print(f"error: --steps {args.steps}: expected at least 1", file=sys.stderr)
        return 2
    if args.read is not None:
        try:
            print(summary(read_trace(args.read), str(args.read)), end="")
        except (OSError, ValueError) as error:
            return fail(str(error))
        return 0
    warnings.filterwarnings("ignore", category=FutureWarning)
    out = args.out or Path("runs") / f"profile-{args.model}-{args.mix}"
    try:
        with tempfile.TemporaryDirectory() as folder:
            reading, what = profile(args, Path(folder), out)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    on_gpu = torch.cuda.is_available()
    machine = torch.cuda.get_device_name() if on_gpu else processor_slug()
    packs = f"F = {what['frames']}, T = {what['tokens']}, {what['packs']} packs a step"
    text = summary(reading, f"{args.model}, {args.mix}, {packs}, on {machine}")
    (out / "summary.md").write_text(text, encoding="utf-8")
    print(text)
    name = f"profile-{args.model}-{args.mix}-{machine.lower().replace(' ', '-')}.json"
    path = args.json or RESULTS / name
    missing = [phase for phase in FORWARD if not reading.host[phase]]
    write_json(path, record("benchmarks.profile", arguments, figures_of(reading), packs=what, empty_phases=missing))
    print(f"trace and summary in {out}, figures in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
