"""Plan before training: a configuration that fits the GPU, its time and cost; capacities with which packs are full.

python launch/plan.py --model 1b7 --gpu rtx5090 --gpus 1
python launch/plan.py --model 135m --gpu h100 --gpus 4 --stage stage1 --json plan.json
python launch/plan.py --model 360m --table                     (every GPU x 1, 2, 4 and 8)

All that is predicted, without a GPU; docs/memory.md says how. From the index of the data come the capacities:

python launch/plan.py --propose shards/train --mixture stage2
python launch/plan.py --propose shards/train --tokens 8192 --objective ce_all question_first=0.5 looks=4
python launch/plan.py --propose 'indexes/*.idx' --mixture stage2 --cache-dir /data/cache      (tars need not be here)

Prints what to paste into a run's YAML, with the share of each capacity that is in use, and which samples find no place.
Exit code 0: done, 1: failed, nothing fits, or packs stay emptier than they should, 2: wrong usage or configuration.
"""

from __future__ import annotations

import argparse
import glob
import json
import logging
import os
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tqdm import tqdm

from fvlm.config import REPOSITORY
from fvlm.data.capacities import FILL
from fvlm.data.mixture import Mixture, MixtureConfig, read_base
from fvlm.data.proposal import Proposal, propose_plan
from fvlm.data.table import OBJECTIVES, SampleTable
from fvlm.data.table_store import open_table
from fvlm.model.configuration import PRESETS
from fvlm.schema import ConfigError, apply_override, build
from fvlm.train import planner
from fvlm.train.gpus import GIB, GPUS, find_gpu
from fvlm.train.plan_text import table_of, text_of
from fvlm.train.work_model import SAMPLES

COUNTS = (1, 2, 4, 8)
SYMBOLS = {"tokens": "T", "frames": "F", "visual": "V", "coarse": "C", "samples": "S", "labels": "K"}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    machine = parser.add_argument_group("a configuration for given GPUs")
    machine.add_argument("--model", choices=PRESETS, help="which model")
    machine.add_argument("--gpu", default="rtx5090", help=f"one of {', '.join(GPUS)}; default rtx5090")
    machine.add_argument("--gpus", type=int, default=1, help="number of GPUs, of one machine; default 1")
    machine.add_argument("--stage", default="stage2", choices=SAMPLES, help="whose samples; default stage2")
    machine.add_argument("--memory", type=float, help="GiB of each GPU to use; default what CUDA shows of it")
    machine.add_argument("--host-memory-gb", type=float, help="GB (1e9 bytes) of the machine's own; default: any")
    machine.add_argument("--step-tokens", type=int, default=131_072, help="rows of a step over all GPUs")
    machine.add_argument("--price", type=float, help="US dollars of a GPU hour; default an assumption")
    machine.add_argument("--mfu", type=float, help="measured utilisation while computing; default an assumption")
    machine.add_argument("--measured", type=Path, help="benchmark JSON whose figure mfu replaces the assumption")
    machine.add_argument("--table", action="store_true", help="every GPU x 1, 2, 4, 8; all models without --model")
    machine.add_argument("--json", type=Path, help="also write the plan, or the table's plans, to this file")
    data = parser.add_argument_group("capacities for given data")
    data.add_argument("--propose", action="append", metavar="INDEX", help="folder of shards, .idx file or pattern")
    data.add_argument("--tokens", type=int, default=16384, help="rows (text and visual tokens) of a pack, T")
    data.add_argument("--frames", type=int, help="distinct frames of a pack, F; default: proposed")
    data.add_argument("--longest", type=int, help="tokens of the longest sample that is taken; default: a pack's")
    data.add_argument("--mixture", help="name in launch/configs/mixtures, or a file; default: the data as they are")
    data.add_argument("--objective", choices=OBJECTIVES, default="ce_answer", help="default ce_answer (stage 2)")
    data.add_argument("--tokens-per-frame", type=int, default=1, help="visual tokens of a video frame")
    data.add_argument("--seed", type=int, default=42, help="train.seed of the run")
    data.add_argument("--cache-dir", help="folder to keep the table of a large index in; default: in memory")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the mixture, e.g. question_first=0.5")
    return parser.parse_intermixed_args()


def find_indexes(paths: list[str]) -> list[Path]:
    """The `.idx` files of folders and patterns, in order; raises ConfigError for a path without any."""
    found: set[str] = set()
    for path in paths:
        inside = os.path.join(glob.escape(path), "*.idx") if os.path.isdir(path) else path
        indexes = [name for name in glob.glob(inside) if name.endswith(".idx")]
        if not indexes:
            raise ConfigError(
                f"--propose {path}: no .idx file; expected a folder of shards with their indexes, a pattern, or an "
                f".idx file (shards made elsewhere get indexes on first use: data.cache_dir of a run)"
            )
        found.update(indexes)
    return [Path(name) for name in sorted(found)]


def read_mixture(name: str | None, overrides: list[str], tokens_per_frame: int) -> Mixture:
    """A mixture by name, with overrides; raises ConfigError."""
    values = {}
    for override in overrides:
        apply_override(values, override)
    data = {"mixture": values | ({"base": name} if name else {})}
    read_base(data, REPOSITORY / "launch" / "configs" / "mixtures")
    stated = build(MixtureConfig, data["mixture"], "mixture")
    return Mixture(**asdict(stated), tokens_per_frame=tokens_per_frame)


def fragment(proposal: Proposal) -> list[str]:
    """What belongs into a run's YAML, and as comments what follows from it."""
    capacities, fill = proposal.capacities, proposal.fill

    def line(start: str, name: str) -> str:
        return f"{start}{name}: {getattr(capacities, name)}".ljust(22) + f"# {SYMBOLS[name]}: {fill[name]:.1%} in use"

    return [
        "data:",
        line("  ", "tokens"),
        line("  ", "frames"),
        f"  window: {proposal.window}".ljust(22) + "# samples packed together",
        "  # a run finds these by itself:",
        *(line("  # ", name) for name in ("visual", "coarse", "samples", "labels")),
    ]


def summary(proposal: Proposal, table: SampleTable, num_shards: int) -> list[str]:
    """What was looked at, and what finds no place; as comments."""
    refused = ", ".join(f"{reason} {num:,}" for reason, num in proposal.refused.most_common()) or "none"
    lines = [
        f"{len(table):,} samples of {len(table.source_names)} sources in {num_shards:,} shards",
        f"in use: over {proposal.samples:,} samples in {proposal.packs:,} packs, "
        f"{proposal.samples / max(proposal.packs, 1):.1f} a pack",
        f"refused: {refused}; the longest sample taken has at most {proposal.capacities.max_seqlen:,} tokens",
    ]
    if not proposal.is_full:
        wanted = ", ".join(f"{share:.0%} of {name}" for name, share in FILL.items())
        lines.append(
            f"not as full as packs should be ({wanted}): raise --tokens, or, where a few samples with many frames "
            f"decide F, give --frames"
        )
    return [f"# {line}" for line in lines]


def propose(args: argparse.Namespace) -> int:
    """Read the index, propose, print."""
    shards = find_indexes(args.propose)
    mixture = read_mixture(args.mixture, args.overrides, args.tokens_per_frame)
    table = open_table(shards, None, args.cache_dir, tags=mixture.tag_caps or ()).table
    proposal = propose_plan(
        table,
        mixture,
        tokens=args.tokens,
        objective=args.objective,
        frames=args.frames,
        max_seqlen=args.longest,
        seed=args.seed,
    )
    print("\n".join([*summary(proposal, table, len(shards)), *fragment(proposal)]))
    return 0 if proposal.is_full else 1


def requests(args: argparse.Namespace) -> list[planner.Request]:
    """What the command line asks to plan for. Raises ConfigError."""
    for name in ("gpus", "step_tokens", "memory", "host_memory_gb", "price"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: expected more than 0")
    mfu = args.mfu if args.measured is None else read_mfu(args.measured)
    if mfu is not None and not 0 < mfu <= 1:
        raise ConfigError(f"utilisation {mfu}: expected a share above 0 and at most 1")
    if args.model is None and not args.table:
        raise ConfigError(
            f"expected --model, one of {', '.join(PRESETS)}, e.g. --model 1b7 --gpu rtx5090; or --propose INDEX"
        )
    models = [args.model] if args.model else list(PRESETS)
    machines = [(gpu, n) for gpu in GPUS for n in COUNTS] if args.table else [(args.gpu, args.gpus)]
    return [
        planner.Request(
            model=model, stage=args.stage, gpu=find_gpu(gpu), ranks=ranks, step_tokens=args.step_tokens,
            limit=args.memory or find_gpu(gpu).memory, mfu=mfu, price=args.price,
            host_limit=args.host_memory_gb and args.host_memory_gb * 1e9 / GIB,
        )
        for model in models
        for gpu, ranks in machines
    ]  # fmt: skip


def read_mfu(path: Path) -> float:
    """The figure `mfu` of a benchmark's JSON; raises ConfigError."""
    try:
        return float(json.loads(path.read_text(encoding="utf-8"))["figures"]["mfu"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--measured {path}: expected a benchmark's JSON with figures.mfu: {error!r}") from None


def plan_machine(args: argparse.Namespace) -> int:
    """Plan, print, write."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    wanted = requests(args)
    planned: list[tuple[planner.Request, planner.Choice | None]] = []
    with tqdm(total=len(wanted), desc="plan", leave=False) as bar:
        for request in wanted:
            planned.append((request, planner.propose(request, bar.set_postfix_str)))
            bar.update()
    if args.table:
        print(table_of(planned))
    else:
        request, choice = planned[0]
        nothing = f"plan: {request.model} fits {request.gpu.name} x {request.ranks} in no configuration"
        nothing += f" that takes at most {args.host_memory_gb:g} GB of host memory" if args.host_memory_gb else ""
        print(text_of(request, choice) if choice else nothing)
    if args.json:
        plans = [planner.summary(request, choice) for request, choice in planned if choice is not None]
        args.json.write_text(json.dumps(plans, indent=1) + "\n", encoding="utf-8")
    return 0 if any(choice for _, choice in planned) else 1


def main() -> int:
    """Parse, propose, and turn what went wrong into one message and an exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    args = parse()
    try:
        return propose(args) if args.propose else plan_machine(args)
    except (ConfigError, ValueError, OSError) as error:
        print(f"plan: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1


if __name__ == "__main__":
    sys.exit(main())
