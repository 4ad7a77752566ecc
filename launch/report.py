"""Write what records say, as markdown with figures: of a run, of several stages, of studies; nothing is computed anew.

python launch/report.py runs/demo --compare runs/demo-coarse runs/demo-pooled-4 --out runs/demo/report.md
python launch/report.py --card runs/stage1_135m runs/stage2_135m runs/dpo_135m --study runs/ablations --out report.md
python launch/report.py --figures runs/ablations runs/grid --out figures
python launch/report.py --go-no-go runs/ablations runs/grid runs/stage1_135m --out go-no-go.md

--card: progress by stage, cost, environment, sample outputs. --figures: all figures that a study's results.csv,
families.csv, curves.csv and fits.json hold (yours will do, with the same columns), listed in figures.md; the rest with
the reason. --go-no-go: whether a longer run should be begun, check by check with its evidence.

Exit code 0: done, with --go-no-go: go. 1: failed with one message, with --go-no-go: no-go. 2: wrong usage.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fvlm.config import REPOSITORY
from fvlm.research.card import write_card
from fvlm.research.figures.catalogue import write_figures
from fvlm.research.gonogo.checks import as_markdown, check, go, open_subject, verdict
from fvlm.research.report import write_report, write_text


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line: one of RUN, --card, --figures, --go-no-go."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", help="folder of a run (config.yaml, metrics.csv, evaluation/ ...)")
    parser.add_argument("--card", type=Path, nargs="+", metavar="RUN", help="the stages of a model, in their order")
    parser.add_argument("--figures", type=Path, nargs="+", metavar="STUDY", help="studies: folders, or a CSV each")
    parser.add_argument("--go-no-go", type=Path, nargs="+", metavar="STUDY|RUN", help="what a decision is to rest on")
    parser.add_argument("--compare", type=Path, nargs="+", default=[], metavar="RUN", help="runs to show beside RUN")
    parser.add_argument("--study", type=Path, nargs="+", default=[], metavar="DIR", help="studies to show in --card")
    parser.add_argument("--arm", help="of --go-no-go: the study's arm to judge; default: the unchanged configuration")
    parser.add_argument(
        "--out",
        type=Path,
        help="markdown file to write (--figures: a folder); default RUN/report.md, report.md, figures; "
        "--go-no-go: only what is printed",
    )
    parser.add_argument("--price-per-hour", type=float, help="money for one device for an hour, for the cost")
    args = parser.parse_args(arguments)
    given = [name for name in ("run", "card", "figures", "go_no_go") if getattr(args, name)]
    if len(given) != 1:
        parser.error("expected a RUN, --card, --figures or --go-no-go, and one of them only")
    for option, needed in (("compare", "run"), ("study", "card"), ("arm", "go_no_go")):
        if getattr(args, option) and given != [needed]:
            parser.error(f"--{option}: not with this; it belongs to {needed.replace('_', '-')}")
    return args


def decide(args: argparse.Namespace) -> int:
    """Print the checks and the verdict; returns 0 for go, 1 for no-go."""
    subjects = [open_subject(path, args.arm) for path in args.go_no_go]
    checks = check(subjects)
    text = as_markdown(subjects, checks)
    print(text)
    if args.out:
        write_text(args.out, text)
    print(f"report: {verdict(checks).replace('*', '')}")
    return 0 if go(checks) else 1


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 done or go, 1 failed with one message or no-go (2, from argparse: wrong usage)."""
    args = parse(arguments)
    options = {"price_per_hour": args.price_per_hour, "repository": REPOSITORY}
    try:
        if args.go_no_go:
            return decide(args)
        if args.figures:
            out, count = write_figures(args.figures, args.out or Path("figures"))
            print(f"report: {out}, {count} figures")
            return 0
        if args.card:
            out = write_card(args.card, args.out or Path("report.md"), args.study, **options)
        else:
            out = write_report(args.run, args.out or args.run / "report.md", args.compare, **options)
    except (FileNotFoundError, ValueError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    print(f"report: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
