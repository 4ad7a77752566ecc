"""Train a grid of sizes, budgets and architectures, one after the other or several at a time, and fit scaling laws.

python launch/scaling_grid.py --grid grid --out runs/grid --dry-run
python launch/scaling_grid.py --grid grid --out runs/grid --parallel 8 data.cache_dir=/data/index
python launch/scaling_grid.py --grid grid_study --out runs/grid-study budgets.C1=1e12 seeds=[42,43]
python launch/scaling_grid.py --fits elsewhere/results.csv --out elsewhere        (fits alone, of anyone's CSV)

key=value changes the grid file where the first key is one of its own, else every run. The same command again goes on
where it was stopped. Exit code 0: done, 1: a run failed, 2: wrong usage or configuration, 75: told to stop and stopped.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fvlm.config import load_config
from fvlm.research.scaling.grid import GridRun, load_grid, plan_grid
from fvlm.research.scaling.optimal import write_fits
from fvlm.research.study.runner import Launcher, run_study
from fvlm.schema import ConfigError


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", default="grid", help="grid YAML: a path, or a bare name in launch/configs/studies")
    parser.add_argument("--out", type=Path, help="folder of the grid; default runs/<grid>, or that of the CSV")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time: a GPU each, or part of the cores")
    parser.add_argument("--ds_config", default="zero2.json", help="DeepSpeed JSON of all runs")
    parser.add_argument("--only", nargs="+", metavar="RUN", help="carry out these runs of the plan alone")
    parser.add_argument("--keep-checkpoints", action="store_true", help="keep those of finished runs")
    parser.add_argument("--dry-run", action="store_true", help="print the runs with samples and operations, and end")
    parser.add_argument("--fits", type=Path, metavar="CSV", help="fit this results.csv, and train nothing")
    parser.add_argument("--size", default="parameters", choices=("parameters", "parameters_llm"), help="what N counts")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. budgets.C1=1e12 train.seed=7")
    args = parser.parse_intermixed_args(arguments)
    if args.only:  # takes all words that follow it, key=value too
        args.overrides += [word for word in args.only if "=" in word]
        args.only = [word for word in args.only if "=" not in word]
    if args.parallel < 1:
        parser.error(f"--parallel {args.parallel}: expected at least 1")
    return args


def table(runs: Sequence[GridRun]) -> str:
    """The plan for a reader, with its sums."""
    width = max(len(each.run.name) for each in runs)
    lines = [f"{'run':{width}}  {'parameters':>13}  {'samples':>11}  {'steps':>8}  {'FLOP':>9}"]
    for each in runs:
        numbers = f"{each.parameters:>13,}  {each.samples:>11,}  {each.steps:>8,}  {each.flops:>9.3g}"
        lines.append(f"{each.run.name:{width}}  {numbers}")
    samples, flops = sum(each.samples for each in runs), sum(each.flops for each in runs)
    total = f"{len(runs)} runs"
    lines.append(f"{total:{width}}  {'':>13}  {samples:>11,}  {'':>8}  {flops:>9.3g}")
    return "\n".join(lines)


def run(args: argparse.Namespace) -> int:
    """Plan, train, tabulate, fit."""
    if args.fits is not None:
        out = args.out or args.fits.parent
        write_fits(args.fits, out, args.size)
        print(f"scaling_grid: {out / 'fits.md'}, {out / 'fits.json'}")
        return 0
    grid, overrides = load_grid(args.grid, args.overrides)
    runs = plan_grid(grid, overrides)
    print(table(runs), flush=True)
    if args.dry_run:
        return 0
    out = args.out or Path("runs") / Path(args.grid).stem
    study = run_study(
        [each.run for each in runs],
        load_config(grid.base, overrides),
        out,
        launcher=Launcher(parallel=args.parallel, ds_config=args.ds_config),
        only=args.only,
        keep_checkpoints=args.keep_checkpoints,
    )
    write_fits(out / "results.csv", out, args.size)
    print(f"scaling_grid: {out / 'results.csv'}, {out / 'fits.md'}")
    return study.exit_code


def main(arguments: Sequence[str] | None = None) -> int:
    """Turn what went wrong into one message and an exit code."""
    args = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        return run(args)
    except (ConfigError, ValueError, OSError) as error:
        print(f"scaling_grid: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1


if __name__ == "__main__":
    sys.exit(main())
