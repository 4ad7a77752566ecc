"""Evaluate a checkpoint in the three modes: losses, multiple choice, lists, attention maps.

python launch/evaluate.py --checkpoint runs/demo
python launch/evaluate.py --checkpoint runs/demo --data shards/val --tasks loss mc --modes coarse_fine autoregressive
deepspeed launch/evaluate.py --checkpoint runs/demo --fine-iterations 2 --out runs/demo/evaluation-2

Exit code 0: done, 1: failed, 2: wrong usage or configuration.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from fvlm.data.chat import load_tokenizer
from fvlm.data.errors import SampleError
from fvlm.data.shard import find_shards
from fvlm.evaluate.attention import save_maps
from fvlm.evaluate.checkpoint import Checkpoint, open_checkpoint
from fvlm.evaluate.suite import MODES, TASKS, Suite, build_suite, evaluate_modes
from fvlm.model.base import cast_parameters
from fvlm.research.reading import with_interval
from fvlm.schema import ConfigError
from fvlm.train.describe import commit, environment, write_json
from fvlm.train.engine import World, start_ranks, stop_ranks, world_from_environment


def at_least_one(text: str) -> int:
    """A count from the command line."""
    try:
        count = int(text)
    except ValueError:
        count = 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least 1")
    return count


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="run folder (its best), checkpoint, model folder, hf:name")
    parser.add_argument("--data", nargs="+", help="validation shards: files, folders, globs; default: the run's")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, help="default: all that the data has questions for")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="default: all")
    parser.add_argument("--fine-iterations", type=at_least_one, help="of coarse_fine; default: the run's first, or 1")
    parser.add_argument("--tokenizer", help="tiny, a Hugging Face id or a folder; default: the run's")
    parser.add_argument("--samples", type=at_least_one, help="validation samples for the losses; default: all")
    parser.add_argument("--questions", type=at_least_one, help="questions of each choice task; default: all")
    parser.add_argument("--tokens", type=at_least_one, default=8192, help="rows of a pack")
    parser.add_argument("--cache-dir", help="folder for indexes of shards made elsewhere; default: the run's")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the weights")
    parser.add_argument("--out", type=Path, help="folder for evaluation.json and maps; default: RUN/evaluation")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    return parser.parse_args()


def prepare(args: argparse.Namespace, checkpoint: Checkpoint, world: World) -> Suite:
    """The validation set and its questions, as this checkpoint has to see them."""
    config = checkpoint.config
    data = args.data or (list(config.data.val) if config else None)
    if not data:
        raise ConfigError("--data: the checkpoint names no validation shards; give files, folders or globs")
    tokenizer = args.tokenizer or (config.tokenizer if config else None)
    if tokenizer is None:
        raise ConfigError("--tokenizer: the checkpoint does not say which; give tiny, a Hugging Face id or a folder")
    cache_dir = args.cache_dir or (config.data.cache_dir if config else None)
    return build_suite(
        find_shards(data),
        load_tokenizer(tokenizer),
        checkpoint.mixture,
        image_size=config.model.frame_size if config else checkpoint.model.config.image_size,
        device=world.device,
        tasks=args.tasks,
        objective=config.train.objective if config else "ce_answer",
        tokens=args.tokens,
        most_samples=args.samples,
        most_questions=args.questions,
        cache_dir=Path(cache_dir) if cache_dir else None,
    )


def output_folder(args: argparse.Namespace) -> Path:
    """Where the records go."""
    if args.out is None and not (Path(args.checkpoint) / "checkpoints").is_dir():
        raise ConfigError("--out: needed where --checkpoint is not a run's folder")
    return args.out or Path(args.checkpoint) / "evaluation"


def evaluate(args: argparse.Namespace, world: World) -> None:
    """Open, ask, write, print."""
    out, checkpoint = output_folder(args), open_checkpoint(args.checkpoint)
    suite = prepare(args, checkpoint, world)
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    model = cast_parameters(checkpoint.model.to(world.device), dtype)
    iterations = args.fine_iterations or (checkpoint.config.train.fine_iterations[0] if checkpoint.config else 1)
    has_modes = model.config.architecture == "foveated"
    modes = args.modes if has_modes else ["coarse_fine"]  # without queries all modes are the same
    found = evaluate_modes(suite, model, modes, iterations)
    maps = suite.maps(model, modes, iterations)
    if not world.is_main:
        return
    out.mkdir(parents=True, exist_ok=True)
    paths = save_maps(maps, out / "maps")
    record = {
        "command": ["evaluate.py", *sys.argv[1:]],
        "checkpoint": checkpoint.weights,
        "architecture": model.config.architecture,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "fine_iterations": iterations,
        "ranks": world.size,
        "dtype": args.dtype,
        "commit": commit(),
        "environment": environment(),
        **found,
        "maps": [str(path.relative_to(out)) for path in paths],
        "maps_skipped": dict(suite.clips_skipped),
    }
    write_json(out / "evaluation.json", record)
    print_table(record)
    print(f"evaluate: {out / 'evaluation.json'}, {len(paths)} clips with attention maps")


def print_table(record: dict[str, Any]) -> None:
    """One line a mode, and the gap of deployment to training."""
    print(f"{'mode':16}{'loss':>9}{'ratio':>9}{'entropy':>9}{'ms/sample':>11}  {'multiple choice':24}lists")
    for mode, figures in record["modes"].items():
        loss = figures.get("loss") or {}
        seconds = figures.get("seconds_per_sample")
        numbers = [loss.get("loss"), loss.get("loss_ratio"), loss.get("attention_entropy")]
        cells = [f"{'-' if x is None else f'{x:.4f}':>9}" for x in numbers]
        cells.append(f"{'-' if seconds is None else f'{1000 * seconds:.2f}':>11}")
        tasks = [with_interval((figures.get(task) or {}).get("overall")) for task in ("multiple_choice", "slots")]
        print(f"{mode:16}{''.join(cells)}  {tasks[0]:24}{tasks[1]}")
    if record["gaps"]:
        named = ", ".join(f"{name} {gap:+.4f}" for name, gap in record["gaps"].items())
        print(f"autoregressive minus coarse_fine: {named}")


def main() -> int:
    """Parse, evaluate, and turn what went wrong into one message and an exit code."""
    args = parse()
    world = world_from_environment()
    logging.basicConfig(level=logging.INFO if world.is_main else logging.ERROR, format="%(message)s")
    try:
        if world.size > 1:
            start_ranks()
        evaluate(args, world)
        stop_ranks()
    except (ConfigError, SampleError, ValueError, OSError) as error:
        print(f"evaluate: {error}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
