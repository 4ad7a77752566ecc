"""Evaluate a checkpoint in the three modes: losses, multiple choice, lists, captions, benchmarks, attention maps.

python launch/evaluate.py --checkpoint runs/demo
python launch/evaluate.py --checkpoint runs/demo --data shards/val --tasks loss mc --modes coarse_fine autoregressive
python launch/evaluate.py --checkpoint runs/demo --tasks mvbench pope --benchmark-data published --answers generate
python launch/evaluate.py --checkpoint runs/demo --tasks loss mc --orderings video_first question_first
deepspeed launch/evaluate.py --checkpoint runs/demo --fine-iterations 2 --out runs/demo/evaluation-2

evaluation.json is written part by part: the same command goes on where it stopped; further tasks or modes are added.

Exit code 0: done, 1: failed, 2: wrong usage or configuration.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from fvlm.data.chat import load_tokenizer, tokenizer_hash
from fvlm.data.errors import SampleError
from fvlm.data.shard import find_shards
from fvlm.evaluate.asking import Questions, evaluate_modes, ordering_table
from fvlm.evaluate.attention import save_maps
from fvlm.evaluate.benchmarks.catalogue import READERS, open_benchmark
from fvlm.evaluate.checkpoint import Checkpoint, open_checkpoint
from fvlm.evaluate.items import Presentation
from fvlm.evaluate.progress import benchmark_digest, file_digest, resume, set_digest
from fvlm.evaluate.ranks import gather_over_ranks
from fvlm.evaluate.suite import ORDERINGS, TASKS, build_suite
from fvlm.evaluate.writing import Writer
from fvlm.model.base import cast_parameters
from fvlm.model.configuration import MODES
from fvlm.research.reading import with_interval
from fvlm.schema import ConfigError
from fvlm.train.describe import commit, environment, write_json
from fvlm.train.engine import World, start_ranks, stop_ranks, world_from_environment
from fvlm.train.logs import start_logging


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
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=(*TASKS, *READERS),
        metavar="TASK",
        help=f"of the validation set: {', '.join(TASKS)}; default: all that it has questions for. "
        f"Published benchmarks: {', '.join(READERS)}",
    )
    parser.add_argument("--benchmark-data", type=Path, help="folder with a benchmark a folder, as published")
    parser.add_argument(
        "--answers",
        choices=("likelihood", "generate"),
        default="likelihood",
        help="how multiple choice is answered: the likeliest option, the default, or by what is written",
    )
    parser.add_argument("--new-tokens", type=at_least_one, default=64, help="most tokens of what is written")
    parser.add_argument(
        "--orderings", nargs="+", choices=ORDERINGS, default=["video_first"], help="default: video_first; both: a table"
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="default: all")
    parser.add_argument("--fine-iterations", type=at_least_one, help="of coarse_fine; default: the run's first, or 1")
    parser.add_argument("--tokenizer", help="tiny, a Hugging Face id or a folder; default: the run's")
    parser.add_argument("--samples", type=at_least_one, help="validation samples for the losses; default: all")
    parser.add_argument("--questions", type=at_least_one, help="questions of each further task; default: all")
    parser.add_argument("--tokens", type=at_least_one, default=8192, help="rows of a pack")
    parser.add_argument("--cache-dir", help="folder for indexes of shards made elsewhere; default: the run's")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the weights")
    parser.add_argument("--out", type=Path, help="folder for evaluation.json and maps; default: RUN/evaluation")
    parser.add_argument("--restart", action="store_true", help="begin anew, whatever was found before")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    return parser.parse_args()


def prepare(args: argparse.Namespace, checkpoint: Checkpoint, world: World, ordering: str) -> Questions:
    """The validation set, the benchmarks and their questions, as this checkpoint has to see them."""
    config = checkpoint.config
    name = args.tokenizer or (config.tokenizer if config else None)
    if name is None:
        raise ConfigError("--tokenizer: the checkpoint does not say which; give tiny, a Hugging Face id or a folder")
    tokenizer, mixture, layout = load_tokenizer(name), checkpoint.mixture, ORDERINGS[ordering]
    size = config.model.frame_size if config else checkpoint.model.config.image_size
    presentation = Presentation(image_size=size, layout=layout, grid=mixture.grid, **mixture.visual_arguments)
    named = [task for task in args.tasks or () if task in READERS]
    if named and args.benchmark_data is None:
        raise ConfigError(f"--benchmark-data: needed for {', '.join(named)}: a folder with a folder of each")
    suite = None
    if args.tasks is None or len(named) < len(args.tasks):
        suite = _suite(args, checkpoint, world, tokenizer, layout, size, [t for t in args.tasks or () if t in TASKS])
    found = [
        open_benchmark(task, args.benchmark_data, tokenizer, presentation, most_questions=args.questions)
        for task in named
    ]
    writer = Writer(
        tokenizer=tokenizer, presentation=presentation, new_tokens=args.new_tokens, token_budget=args.tokens
    )
    written = args.answers == "generate"
    return Questions(suite=suite, benchmarks=found, device=world.device, writer=writer if written else None)


def _suite(args, checkpoint, world, tokenizer, layout, size, tasks):
    config = checkpoint.config
    data = args.data or (list(config.data.val) if config else None)
    if not data:
        raise ConfigError("--data: the checkpoint names no validation shards; give files, folders or globs")
    cache_dir = args.cache_dir or (config.data.cache_dir if config else None)
    return build_suite(
        find_shards(data),
        tokenizer,
        checkpoint.mixture,
        image_size=size,
        device=world.device,
        tasks=tasks or None,
        objective=config.train.objective if config else "ce_answer",
        tokens=args.tokens,
        most_samples=args.samples,
        most_questions=args.questions,
        new_tokens=args.new_tokens,
        layout=layout,
        cache_dir=Path(cache_dir) if cache_dir else None,
    )


def output_folder(args: argparse.Namespace) -> Path:
    """Where the records go."""
    if args.out is None and not (Path(args.checkpoint) / "checkpoints").is_dir():
        raise ConfigError("--out: needed where --checkpoint is not a run's folder")
    return args.out or Path(args.checkpoint) / "evaluation"


def evaluate(args: argparse.Namespace, world: World) -> None:
    """Open, ask part by part, write, print."""
    out, checkpoint = output_folder(args), open_checkpoint(args.checkpoint)
    orderings = list(dict.fromkeys(args.orderings))
    questions = {ordering: prepare(args, checkpoint, world, ordering) for ordering in orderings}
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    model = cast_parameters(checkpoint.model.to(world.device), dtype)
    config, geometry = checkpoint.config, checkpoint.model.config
    iterations = args.fine_iterations or (config.train.fine_iterations[0] if config else geometry.fine_iterations)
    has_modes = model.config.architecture == "foveated"
    modes = args.modes if has_modes else ["coarse_fine"]  # without queries all modes are the same
    path, record = out / "evaluation.json", None
    if world.is_main:
        out.mkdir(parents=True, exist_ok=True)
        record = resume(path, identity(args, checkpoint, questions[orderings[0]], iterations), args.restart)
        record |= {
            "complete": False,
            "command": ["evaluate.py", *sys.argv[1:]],
            "checkpoint": checkpoint.weights,
            "architecture": model.config.architecture,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "fine_iterations": iterations,
            "ordering": orderings[0],
            "answers": args.answers,
            "ranks": world.size,
            "dtype": args.dtype,
            "commit": commit(),
            "environment": environment(),
        }
    record = gather_over_ranks(record)[0]  # all ranks ask the same parts

    def save() -> None:
        if world.is_main:
            write_json(path, record)

    by_ordering = {}
    for number, ordering in enumerate(orderings):
        part = record.setdefault("other_orderings", {}).setdefault(ordering, {}) if number else record
        evaluate_modes(questions[ordering], model, modes, iterations, part, save)
        by_ordering[ordering] = part["modes"]
    suite = questions[orderings[0]].suite
    if suite and "maps" in suite.tasks:
        draw_maps(record, suite, model, modes, iterations, out, world)
    record["complete"] = True
    save()
    if world.is_main:
        print_table(record)
        print_orderings(by_ordering)
        print(f"evaluate: {path}, {len(record.get('maps', []))} clips with attention maps")


def identity(args: argparse.Namespace, checkpoint: Checkpoint, asked: Questions, iterations: int) -> dict[str, Any]:
    """What the figures depend on; the record of another identity is not gone on with."""
    names = ("samples", "questions", "tokens", "dtype", "answers", "new_tokens")
    arguments = {name: getattr(args, name) for name in names}
    found = {
        "checkpoint": file_digest(Path(checkpoint.weights)),
        "code": commit(),
        "arguments": {
            **arguments,
            **_other_tokenizer(args, checkpoint),
            "fine_iterations": iterations,
            "ordering": args.orderings[0],
        },
    }
    if asked.suite:
        found["data"] = set_digest(asked.suite.indexes)
    return found | {benchmark.name: benchmark_digest(benchmark) for benchmark in asked.benchmarks}


def _other_tokenizer(args: argparse.Namespace, checkpoint: Checkpoint) -> dict[str, str]:
    """The tokenizer where it is not the run's own, of which no record says anything."""
    own = checkpoint.config.tokenizer if checkpoint.config else None
    return {} if args.tokenizer in (None, own) else {"tokenizer": tokenizer_hash(load_tokenizer(args.tokenizer))}


def draw_maps(record, suite, model, modes, iterations, out: Path, world: World) -> None:
    """Attention maps into `out`/maps, unless those of the same modes are there."""
    there = record.get("maps_modes") == list(modes) and all((out / name).is_file() for name in record["maps"])
    if gather_over_ranks(there)[0]:
        return
    maps = suite.maps(model, modes, iterations)
    paths = save_maps(maps, out / "maps") if world.is_main else []
    record["maps"], record["maps_modes"] = [str(path.relative_to(out)) for path in paths], list(modes)
    record["maps_skipped"] = dict(suite.clips_skipped)


def print_table(record: dict[str, Any]) -> None:
    """One line a mode, the further tasks, and the gap of deployment to training."""
    print(f"{'mode':16}{'loss':>9}{'ratio':>9}{'entropy':>9}{'ms/sample':>11}  {'multiple choice':24}lists")
    for mode, figures in record["modes"].items():
        loss = figures.get("loss") or {}
        seconds = figures.get("seconds_per_sample")
        numbers = [loss.get("loss"), loss.get("loss_ratio"), loss.get("attention_entropy")]
        cells = [f"{'-' if x is None else f'{x:.4f}':>9}" for x in numbers]
        cells.append(f"{'-' if seconds is None else f'{1000 * seconds:.2f}':>11}")
        tasks = [with_interval((figures.get(task) or {}).get("overall")) for task in ("multiple_choice", "slots")]
        print(f"{mode:16}{''.join(cells)}  {tasks[0]:24}{tasks[1]}")
    for mode, figures in record["modes"].items():
        for line in further_lines(figures):
            print(f"{mode:16}{line}")
    if record["gaps"]:
        named = ", ".join(f"{name} {gap:+.4f}" for name, gap in record["gaps"].items())
        print(f"autoregressive minus coarse_fine: {named}")


def further_lines(figures: Mapping[str, Any]) -> list[str]:
    """Captions and benchmarks of one mode."""
    lines = []
    if found := figures.get("captions"):
        interval = f"[{found['cider_low']:.3f}–{found['cider_high']:.3f}]"
        others = f"BLEU-4 {found['bleu_4']:.3f}, METEOR {found['meteor']:.3f}, {found['n']} clips"
        lines.append(f"captions: CIDEr {found['cider']:.3f} {interval}, {others}")
    for name in READERS:
        if overall := (figures.get(name) or {}).get("overall"):
            accuracy = with_interval(overall if "accuracy" in overall else None)
            counts = ", ".join(f"{overall[key]} {key}" for key in ("asked", "missing", "broken"))
            lines.append(f"{name}: {accuracy} of those answered; {overall['accuracy_of_asked']:.1%} of all: {counts}")
    return lines


def print_orderings(by_ordering: Mapping[str, Mapping[str, Any]]) -> None:
    """Mode by ordering, where there is more than one."""
    if len(by_ordering) < 2:
        return
    print(f"{'':16}{'ordering':18}{'coarse_only':>14}{'coarse_fine':>14}")
    for name, ordering, cells in ordering_table(by_ordering):
        shown = [f"{cells[mode]:.4f}" if mode in cells else "-" for mode in ("coarse_only", "coarse_fine")]
        print(f"{name:16}{ordering:18}{shown[0]:>14}{shown[1]:>14}")


def main() -> int:
    """Parse, evaluate, and turn what went wrong into one message and an exit code."""
    args = parse()
    world = world_from_environment()
    start_logging(world)
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
