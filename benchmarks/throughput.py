"""Command: the product's training step against the baseline of `benchmarks/naive.py`, on the same samples."""

from __future__ import annotations

import sys
from pathlib import Path

# Run as a script, this folder is where Python looks first, and its `profile` would pass for the standard library's.
if sys.path[0] == str(Path(__file__).resolve().parent):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import logging
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from benchmarks import mixes, throughput_report
from benchmarks.environment import RESULTS, fail, markdown_table, processor_slug, record, write_json
from benchmarks.throughput_report import FORMULA
from benchmarks.throughput_run import Benchmark, climb_ladder, compare
from fvlm.data.errors import SampleError
from fvlm.kernels.launching import gpu_slug
from fvlm.schema import ConfigError
from fvlm.train.engine import World, start_ranks, stop_ranks

DESCRIPTION = """Train on drawn samples of a stage's mix with the product's own loader, loop and engine, and with the
baseline: same weights, same samples step for step, losses compared at every step, in turns in one process.

The headline is the baseline's seconds over the product's, median over the turns; times include loading. The product
runs as the stage's configuration says (launch/configs), but with one fine iteration at every step as the baseline has,
with random weights of the published geometry and the built-in tokenizer: nothing is downloaded. --ladder goes from one
to the other instead, change by change: variants of the baseline, then the product with its settings one after the
other; what cannot run here is listed with the reason.

On a CPU packs are small (--tokens 2048, one a step) and nothing is loaded ahead. On a GPU they are the stage's own,
and the baseline gets the fastest batch size of 8, 16 and 32.

--check compares the speed-up, a ratio, with the last committed result of the same machine, model, mix and settings,
and exits with 1 where more than 10 % of it are gone.

examples:
  python benchmarks/throughput.py --model 135m --mix stage2
  python benchmarks/throughput.py --model 135m --mix stage2 --ladder --steps 3
  python benchmarks/throughput.py --model tiny --steps 3 --tokens 512 --samples 128
  python benchmarks/throughput.py --model 1b7 --check train.activation_checkpointing=true
writes benchmarks/results/throughput[-ladder]-<model>-<mix>-<machine>.json, and a plot of the ladder beside it
"""
MODULE = "benchmarks.throughput"
ONE_LOOK = "train.fine_iterations=[1]"
"""The baseline looks once, and steps of a turn are to be alike: a stage's further iterations are left out of both."""


@dataclass(frozen=True)
class Defaults:
    """What a device measures unless told otherwise."""

    overrides: tuple[str, ...]
    steps: int
    turn: int
    warm_up: int
    samples: int
    batch_size: int | None


CPU = Defaults(("data.tokens=2048", "train.packs_per_step=1", "data.num_workers=0"), 5, 1, 1, 1024, 4)
GPU = Defaults((), 12, 4, 3, 4096, None)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=mixes.MODELS, default="135m")
    parser.add_argument("--mix", choices=list(mixes.STAGES), default="stage2")
    parser.add_argument("--ladder", action="store_true", help="every step on the way from the baseline to the product")
    parser.add_argument("--rungs", nargs="+", metavar="NAME", help="only these of the ladder")
    parser.add_argument("--steps", type=int, help="timed steps of each contender (default 5; on a GPU 12)")
    parser.add_argument("--turn", type=int, help="steps of a turn, timed together (default 1; on a GPU 4)")
    parser.add_argument("--warm-up", type=int, help="steps of each before that (default 1; on a GPU 3)")
    parser.add_argument("--tokens", type=int, help="of a pack (default 2048; on a GPU the stage's own)")
    parser.add_argument(
        "--batch-size", type=int, help="samples of the baseline's batch (default 4; on a GPU see above)"
    )
    parser.add_argument("--samples", type=int, help="to draw (default 1024, dpo 96; on a GPU 4096)")
    parser.add_argument("--zero", default="zero2", help="DeepSpeed JSON of the product, by name or path")
    parser.add_argument("--together", type=int, help="contenders of the ladder alive at a time (default: what fits)")
    parser.add_argument("--scratch", type=Path, help="folder for samples and weights (default: the system's)")
    parser.add_argument("--check", action="store_true", help="exit code 1 where the speed-up has become smaller")
    parser.add_argument("--json", type=Path, help="file to write (default: see above)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the run, e.g. train.packs_per_step=2")
    asked = parser.parse_intermixed_args(arguments)
    default = GPU if torch.cuda.is_available() else CPU
    few = {"samples": 96} if asked.mix == "dpo" and default is CPU else {}  # the reference looks at all of them
    for name in ("steps", "turn", "warm_up", "samples", "batch_size"):
        if getattr(asked, name) is None:
            setattr(asked, name, few.get(name, getattr(default, name)))
        elif getattr(asked, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(asked, name)}: expected at least 1")
    if asked.together is not None and asked.together < 2:
        parser.error(f"--together {asked.together}: expected at least 2, each rung is compared with another")
    asked.turn = min(asked.turn, asked.steps)
    tokens = [f"data.tokens={asked.tokens}"] if asked.tokens else []
    asked.overrides = [ONE_LOOK, *default.overrides, *tokens, *asked.overrides]
    return asked


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 done, 1 it failed or the speed-up is gone, 2 wrong usage or configuration."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    asked = parse(arguments)
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("fvlm.train.build").setLevel(logging.ERROR)  # a small set lacks rare sources, of course
    try:
        world = start_ranks()
        if world.size > 1:
            raise ConfigError(f"{world.size} ranks: expected one; start it with python, without a launcher")
        with tempfile.TemporaryDirectory(prefix="throughput-", dir=asked.scratch) as scratch:
            return _run(asked, arguments, Path(scratch), world)
    except ConfigError as error:
        fail(str(error))
        return 2
    except (RuntimeError, SampleError, OSError) as error:  # out of memory, or losses that differ, too
        return fail(str(error))
    finally:
        stop_ranks()


def _run(asked: argparse.Namespace, arguments: Sequence[str], folder: Path, world: World) -> int:
    workload = mixes.make_workload(
        folder, asked.model, asked.mix, num_samples=asked.samples, overrides=asked.overrides
    )  # fmt: skip
    bench = Benchmark(asked, workload, world)
    print(introduction(bench), flush=True)
    bench.prepare()
    file = asked.json or result_file(asked, world)
    before = throughput_report.committed(file)
    rows, more = climb_ladder(bench, file.with_suffix("")) if asked.ladder else compare(bench)
    more |= {"settings": bench.settings(), "means": workload.means, "capacities": asdict(workload.data.plan.capacities)}
    more |= {"refused": dict(workload.data.plan.refused), "formula": FORMULA, "peak": bench.peak.source}
    contents = record(MODULE, arguments, bench.figures, **more)
    write_json(file, contents)
    print("\n".join(["", markdown_table(rows), "", *conclusions(bench), f"written to {file}"]))
    if not asked.check:
        return 0
    fine, sentence = throughput_report.check(contents, before)
    return fail(sentence) if not fine else print(sentence) or 0


def result_file(asked: argparse.Namespace, world: World) -> Path:
    """Where the result goes, by what was measured and the machine's kind."""
    on_gpu = world.device.type == "cuda"
    machine = gpu_slug(torch.cuda.get_device_name(world.device)) if on_gpu else processor_slug()
    return RESULTS / f"throughput-{'ladder-' if asked.ladder else ''}{asked.model}-{asked.mix}-{machine}.json"


def introduction(bench: Benchmark) -> str:
    """What is going to be trained on what."""
    workload, means, plan = bench.workload, bench.workload.means, bench.schedule
    config, capacities = workload.config, workload.data.plan.capacities
    return (
        f"{workload.model}, {workload.mix}, {bench.dtype}: {workload.drawn.samples} samples drawn, on average "
        f"{means['frames']:.2f} distinct frames, {means['tokens']:.0f} tokens, {means['text']:.0%} text only\n"
        f"a step: {config.train.packs_per_step} packs of {capacities.tokens} tokens and {capacities.frames} frames; "
        f"{plan.turns} turns of {plan.length} steps each after {plan.warm_up} of warm-up"
    )


def conclusions(bench: Benchmark) -> list[str]:
    """What the figures beside the table say, a line each."""
    figures, lines = bench.figures, [FORMULA, f"peak: {bench.peak.flops / 1e12:.3g} TFLOP/s, {bench.peak.source}"]
    if "product/recompilations" in figures:
        launches = figures["product/launches_per_step"]
        lines += [
            f"steady state of the product, per step: {figures['product/host_syncs_ours_per_step']:g} host "
            f"synchronisations of ours, {figures['product/host_syncs_engine_per_step']:g} of the engine, "
            f"{'no' if launches is None else format(launches, 'g')} launches; "
            f"{figures['product/recompilations']} recompilations",
            f"packs: {figures['product/fill_tokens']:.1%} of tokens and {figures['product/fill_frames']:.1%} of frames "
            f"in use, {figures['product/padding_in_attention']} rows of padding in attention",
            f"losses differ by at most {figures['loss_difference']:.1e} (tolerated: {bench.tolerance:g})",
        ]
    if "speedup_p20" in figures:
        spread = f" ({figures['speedup_p20']:.2f}-{figures['speedup_p80']:.2f})"
        lines.append(f"the product is {figures['speedup']:.2f}{spread} times as fast as the baseline")
    else:
        lines.append(f"{figures['top']} is {figures['speedup']:.2f} times as fast as the first rung")
    if "speedup_with_reference" in figures:
        lines.append(
            f"{figures['speedup_with_reference']:.2f} times with the reference's pass over each pair once, as in a run "
            f"of one epoch ({figures['reference_s_per_pair']:.3g} s a pair)"
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
