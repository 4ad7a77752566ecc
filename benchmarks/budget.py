"""Which pack makes a card fastest: F and T by measurement, starting from the planner's proposal.

python -m benchmarks.budget --model 135m --mix stage2                             (the whole card)
python -m benchmarks.budget --model 1b7 --limit 30 --zero zero2_offload           (30 GiB of it)
python -m benchmarks.budget --model tiny --limit 0.2 --grain 64 --steps 1         (a rehearsal on a CPU)

Each T is tried in a process of its own: whole worst-case steps under the limit, then real steps that are timed. F and
the other capacities are those that the mix calls for at that T (fvlm/data/capacities.py). T is doubled or halved from
the proposal until one fits and one does not, and then bisected. On a CPU the limit is on what is alive at once.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import mixes
from benchmarks.budget_trial import Trial
from benchmarks.environment import RESULTS, ROOT, fail, markdown_table, processor_slug, record, write_json
from benchmarks.memory import BESIDE
from fvlm.model import FoveatedConfig
from fvlm.model.configuration import PRESETS
from fvlm.schema import ConfigError
from fvlm.train.gpus import GIB, GPUS, Gpu
from fvlm.train.planner import Request, capacities_for, predict, propose
from fvlm.train.work_model import SAMPLES
from fvlm.train.zero_config import read_zero_json
from fvlm.train_config import CheckpointingConfig

LARGEST = 65536
"""Tokens of a pack; larger ones are not tried."""
FINE = 8
"""T is found to one part in so many."""
AS_FAST = 0.98
"""Of those that reach this share of the best speed, the smallest pack is chosen."""

Try = Callable[[int], dict[str, Any]]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=mixes.MODELS, default="135m")
    parser.add_argument("--mix", choices=list(mixes.STAGES), default="stage2")
    parser.add_argument("--limit", type=float, help="GiB that may be used; default: all of the GPU; needed on a CPU")
    parser.add_argument("--zero", help="DeepSpeed JSON; default: the planner's choice")
    parser.add_argument("--checkpointing", type=float, help="share of blocks recomputed; default: the planner's choice")
    parser.add_argument("--grain", type=int, default=1024, help="T is a multiple of this")
    parser.add_argument("--largest", type=int, default=LARGEST, help="T to try at most")
    parser.add_argument("--steps", type=int, default=4, help="real steps that are timed at each T")
    parser.add_argument("--step-tokens", type=int, default=131_072, help="rows of a real step, in whole packs")
    parser.add_argument("--samples", type=int, default=4096, help="samples to draw")
    parser.add_argument("--timeout", type=float, default=300, help="seconds after which a trial counts as failed")
    parser.add_argument("--json", type=Path, help="result file; default benchmarks/results/budget-<what>.json")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the run, e.g. data.num_workers=4")
    return parser.parse_intermixed_args(arguments)


def start(args: argparse.Namespace, limit: float, geometry: FoveatedConfig) -> tuple[str, CheckpointingConfig, int]:
    """ZeRO JSON, recomputation and T to begin with, as the planner predicts them; what was given stands."""
    share = args.checkpointing
    given = None if share is None else CheckpointingConfig(encoder=share, llm=share)
    if args.model in PRESETS and args.zero is None and given is None:
        request = Request(model=args.model, stage=args.mix, gpu=_gpu(), ranks=1, limit=limit)
        choice = propose(request, lambda text: print(f"planner: {text}", file=sys.stderr))
        if choice is None:
            raise ConfigError(f"--limit {limit:g}: the planner finds no configuration of {args.model} that fits")
        return choice.zero, choice.checkpointing, choice.capacities.tokens
    zero, given = args.zero or "zero1", given or CheckpointingConfig(encoder=0.0, llm=0.0)
    on_gpu, tokens = torch.cuda.is_available(), args.largest
    while tokens > args.grain:
        capacities = capacities_for(SAMPLES[args.mix], tokens)
        memory = predict(
            geometry, capacities, read_zero_json(zero)[0], 1, dtype="bf16" if on_gpu else "fp32", checkpointing=given,
            backend="triton" if on_gpu else "torch",
        )  # fmt: skip
        held = {name: size for name, size in memory.items() if on_gpu or name not in BESIDE}
        if sum(held.values()) <= limit * GIB:
            break
        tokens = max(tokens // 2 // args.grain, 1) * args.grain
    return zero, given, tokens


def _gpu() -> Gpu:
    """The planner's entry for this card; for one that it does not know, the smallest that is not smaller."""
    name, memory = torch.cuda.get_device_name().lower(), torch.cuda.get_device_properties(0).total_memory / GIB
    named = [gpu for gpu in GPUS.values() if gpu.name.split()[0].lower() in name and gpu.memory <= memory + 1]
    larger = [gpu for gpu in GPUS.values() if gpu.memory >= memory - 1]
    return max(named, key=lambda gpu: gpu.memory) if named else min(larger or GPUS.values(), key=lambda gpu: gpu.memory)


def search(attempt: Try, first: int, grain: int, largest: int) -> dict[int, dict[str, Any]]:
    """Try T until the largest that fits is known to one part in `FINE`; what was found by T, in the order of trying.

    Empty of `fits` where not even one `grain` does.
    """
    found: dict[int, dict[str, Any]] = {}

    def fits(tokens: int) -> bool:
        if tokens not in found:
            found[tokens] = attempt(tokens)
        return found[tokens]["fits"]

    largest = max(largest // grain, 1) * grain
    low, high = 0, largest + grain
    tokens = min(max(first // grain, 1) * grain, largest)
    while low == 0 or high > largest:  # until one fits and one does not
        if fits(tokens):
            low = tokens
            if tokens == largest:
                return found
            tokens = min(2 * tokens, largest) if high > largest else tokens
        else:
            high = tokens
            if tokens == grain:
                return found
            tokens = max(tokens // 2 // grain, 1) * grain if low == 0 else tokens
    while high - low > max(grain, low // FINE):
        tokens = (low + high) // 2 // grain * grain
        low, high = (tokens, high) if fits(tokens) else (low, tokens)
    return found


def fastest(found: dict[int, dict[str, Any]]) -> int | None:
    """T of the fastest that fits, of about equally fast ones the smallest; None where none does."""
    speeds = {tokens: result["samples_per_second"] for tokens, result in found.items() if result["fits"]}
    return min((t for t, speed in speeds.items() if speed >= AS_FAST * max(speeds.values())), default=None)


def attempt_in_child(trial: Trial, timeout: float) -> dict[str, Any]:
    """The trial's finding. A child that the system kills, or that does not end, does not fit either.

    Raises RuntimeError for one that fails in any other way.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", "benchmarks.budget_trial", json.dumps(asdict(trial)), str(result)]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)
        except subprocess.TimeoutExpired:
            return {"fits": False, "reason": f"not done after {timeout:g} s"}
        if result.exists():
            return json.loads(result.read_text())
    if done.returncode < 0:
        return {"fits": False, "reason": f"ended by signal {-done.returncode}"}
    said = [line for line in done.stderr.splitlines() if line.strip()] or ["nothing on stderr"]
    raise RuntimeError(f"T = {trial.tokens}: exit code {done.returncode}: {said[-1]}")


def run(args: argparse.Namespace, limit: float, folder: Path) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
    """What the search began with, and what it found."""
    on_gpu = torch.cuda.is_available()
    drawing = [*([] if on_gpu else ["data.num_workers=0"]), *args.overrides]
    config = mixes.run_config(folder, args.model, args.mix, drawing)
    mixes.draw_set(folder, args.samples, config.model.frame_size, mixes.SEED, args.mix)
    mixes.draw_weights(folder / "weights", config)
    geometry = FoveatedConfig.from_pretrained(folder / "weights")
    zero, checkpointing, first = start(args, limit, geometry)
    print(f"planner: {zero}, {checkpointing}, T = {first}", file=sys.stderr)

    def attempt(tokens: int) -> dict[str, Any]:
        trial = Trial(
            folder=str(folder), model=args.model, mix=args.mix, zero=zero, checkpointing=checkpointing, tokens=tokens,
            packs=max(1, round(args.step_tokens / tokens)), limit=limit, steps=args.steps, overrides=tuple(drawing),
        )  # fmt: skip
        result = attempt_in_child(trial, args.timeout)
        print(f"T = {tokens}: {_line(result)}", file=sys.stderr, flush=True)
        return result

    began = {"zero": zero, "checkpointing": asdict(checkpointing), "tokens": first}
    return began, search(attempt, first, args.grain, args.largest)


def _line(result: dict[str, Any]) -> str:
    if not result["fits"]:
        return result["reason"]
    frames, speed = result["capacities"]["frames"], result["samples_per_second"]
    return f"F = {frames}, peak {result['peak_gib']:.3f} GiB, {speed:.1f} samples/s"


def main(arguments: list[str] | None = None) -> int:
    """Search, print, write; 0 found, 1 nothing fits or a trial failed, 2 wrong usage."""
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parse(arguments)
    on_gpu = torch.cuda.is_available()
    if args.limit is None and not on_gpu:
        print("error: --limit: on a CPU give one, in GiB, for example --limit 0.2", file=sys.stderr)
        return 2
    limit = args.limit or torch.cuda.get_device_properties(0).total_memory / GIB
    try:
        with tempfile.TemporaryDirectory() as folder:
            began, found = run(args, limit, Path(folder))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        return fail(str(error))
    best = fastest(found)
    if best is None:
        return fail(f"not even T = {min(found)} fits into {limit:g} GiB: {found[min(found)]['reason']}")
    rows = [
        {"T": tokens, "F": r["capacities"]["frames"], "peak, GiB": f"{r['peak_gib']:.3f}",
         "samples/s": f"{r['samples_per_second']:.1f}"} if r["fits"] else
        {"T": tokens, "F": None, "peak, GiB": r["reason"], "samples/s": None}
        for tokens, r in sorted(found.items())
    ]  # fmt: skip
    chosen = found[best]
    print(f"{markdown_table(rows)}\n\nfastest in {limit:g} GiB: --ds_config {began['zero']}.json "
          f"data.tokens={best} data.frames={chosen['capacities']['frames']}")  # fmt: skip
    figures = {
        "tokens": best,
        "frames": chosen["capacities"]["frames"],
        "samples_per_second": chosen["samples_per_second"],
        "peak_gib": chosen["peak_gib"],
        "limit_gib": limit,
        "largest_tokens_that_fit": max(tokens for tokens, result in found.items() if result["fits"]),
        "planned_tokens": began["tokens"],
    }
    machine = torch.cuda.get_device_name().lower().replace(" ", "-") if on_gpu else processor_slug()
    path = args.json or RESULTS / f"budget-{args.model}-{args.mix}-{limit:g}gib-{machine}.json"
    tried = {str(tokens): result for tokens, result in found.items()}
    write_json(path, record("benchmarks.budget", arguments, figures, began=began, tried=tried))
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
