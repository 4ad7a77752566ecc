"""Ablations: the runs of a matrix of questions, one change each to a base, carried out, tabulated and judged.

python launch/ablate.py --base study --matrix ablations --dry-run                   (what would be run, as differences)
python launch/ablate.py --base study --matrix ablations --out runs/ablations --parallel 2
python launch/ablate.py --base study --matrix ablations --out runs/ablations --only F3 A6 Q --seeds 0 1 2
python launch/ablate.py --base study --matrix ablations --out runs/ablations train.total_samples=2e4    (of all runs)

The same command again goes on: finished runs are left alone, stopped ones continue, failed ones are tried once more.
Written to --out: plan.json, results.csv, families.csv, curves.csv, timing.csv, ablations.md (table, verdicts, what
follows) and experiments.md (a log that only grows).

Exit code 0: done, 1: runs failed (results.csv says why), 2: wrong usage or configuration, 75: stopped, and resumable.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fvlm.config import load_config
from fvlm.research.ablation.arms import describe, plan_ablations
from fvlm.research.ablation.matrix import load_matrix
from fvlm.research.ablation.results import write_results
from fvlm.research.ablation.verdicts import said
from fvlm.research.study.runner import Launcher, collect_again, read_plan, run_study
from fvlm.schema import ConfigError


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="run YAML that every arm changes: a path, or a bare name")
    parser.add_argument("--matrix", default="ablations", help="YAML of questions and arms: a path, or a bare name")
    parser.add_argument("--out", type=Path, help="folder of the study; default runs/<matrix>-<base>")
    parser.add_argument("--only", nargs="+", default=[], metavar="ARM", help="arms or questions; default: all")
    parser.add_argument("--seeds", nargs="+", default=[], help="default: the matrix's")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time: a GPU each, or parts of the CPU cores")
    parser.add_argument("--ds_config", default="zero2.json", help="DeepSpeed JSON of all runs")
    parser.add_argument("--keep-checkpoints", action="store_true", help="of finished runs too")
    parser.add_argument("--log", type=Path, help="log of experiments to append to; default OUT/experiments.md")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and run nothing")
    parser.add_argument("--collect", action="store_true", help="run nothing, write the tables and verdicts anew")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the base, e.g. train.total_samples=2e4")
    args = parser.parse_intermixed_args()
    for words in (args.only, args.seeds):  # take all words that follow them, key=value too
        args.overrides += [word for word in words if "=" in word]
    args.only = [word for word in args.only if "=" not in word]
    try:
        args.seeds = [int(word) for word in args.seeds if "=" not in word]
    except ValueError:
        parser.error(f"--seeds {' '.join(args.seeds)}: expected whole numbers")
    if args.parallel < 1:
        parser.error(f"--parallel {args.parallel}: expected at least 1")
    return args


def ablate(args: argparse.Namespace) -> int:
    """Plan, run, judge, print."""
    base, matrix = load_config(args.base, args.overrides), load_matrix(args.matrix)
    out = args.out or Path("runs") / f"{Path(args.matrix).stem}-{base.name}"
    plan = plan_ablations(matrix, base, out, only=args.only, seeds=args.seeds, earlier=read_plan(out))
    if args.dry_run:
        print(*describe(plan, matrix, base), sep="\n")
        return 0
    code = 0
    if args.collect:
        collect_again(plan.runs, base, out)
    else:
        launcher = Launcher(parallel=args.parallel, ds_config=args.ds_config)
        keep = args.keep_checkpoints
        code = run_study(plan.runs, base, out, launcher=launcher, only=plan.chosen, keep_checkpoints=keep).exit_code
    verdicts = write_results(matrix, plan, base.name, out, args.log or out / "experiments.md")
    for name, found in verdicts.items():
        print(f"{name:10} {said(found):22} {matrix.questions[name].asks}")
    print(f"ablate: {out / 'ablations.md'}")
    return code


def main() -> int:
    """Parse, ablate, and turn what went wrong into one message and an exit code."""
    args = parse()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        return ablate(args)
    except (ConfigError, ValueError, OSError) as error:
        print(f"ablate: {error}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, ConfigError) else 1


if __name__ == "__main__":
    sys.exit(main())
