"""Write the report card of a run: markdown with figures, from its records alone.

python launch/report.py runs/demo --compare runs/demo_coarse runs/demo_pooled4 --out runs/demo/report.md
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fvlm.config import REPOSITORY
from fvlm.research.report import write_report


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 done, 1 failed with one message (2, from argparse: wrong usage)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the run (config.yaml, metrics.csv, evaluation/ ...)")
    parser.add_argument("--compare", type=Path, nargs="+", default=[], metavar="RUN", help="runs to show beside it")
    parser.add_argument("--out", type=Path, help="markdown file to write; default RUN/report.md")
    parser.add_argument("--price-per-hour", type=float, help="money for one device for an hour, for the cost")
    args = parser.parse_args(arguments)
    out = args.out or args.run / "report.md"
    try:
        write_report(args.run, out, args.compare, price_per_hour=args.price_per_hour, repository=REPOSITORY)
    except (FileNotFoundError, ValueError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    print(f"report: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
