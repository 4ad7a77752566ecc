"""Command line of the synthetic corpus."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from data_prep.synthetic.corpus import DEFAULT_MIX, Corpus, write_corpus
from data_prep.synthetic.families import FAMILIES

DESCRIPTION = """Draw clips that reward looking, with questions, captions and texts: DIR/train.jsonl, DIR/val.jsonl.

example:
  python -m data_prep.synthetic --out data/clips --clips 8000 --val-clips 400 --mix cue=0.6,caption=0.2,text=0.2
"""


def mix(text: str) -> dict[str, float]:
    """`cue=0.6,caption=0.4` or `cue,caption` (equal shares)."""
    weights = {}
    for part in text.split(","):
        name, _, weight = part.strip().partition("=")
        try:
            weights[name] = float(weight or 1)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{part!r}: expected family=weight") from error
    return weights


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.synthetic",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default_mix = ",".join(f"{name}={weight:g}" for name, weight in DEFAULT_MIX.items())
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--clips", type=int, default=1000, help="training items (default 1000)")
    parser.add_argument("--val-clips", type=int, default=0, help="validation items (default 0)")
    parser.add_argument("--seed", type=int, default=0, help="the corpus is a function of it (default 0)")
    parser.add_argument(
        "--mix",
        "--families",
        type=mix,
        default=DEFAULT_MIX,
        help=f"families of {', '.join(FAMILIES)}, with weights or in equal shares (default {default_mix})",
    )
    parser.add_argument("--difficulty", type=int, default=1, help="1, 2 or 3: frames, glyphs, motion (default 1)")
    parser.add_argument("--frames", type=int, help="scenes in a clip, one a second (default by difficulty: 6, 8, 12)")
    parser.add_argument("--size", type=int, default=224, help="width and height in pixels (default 224)")
    parser.add_argument("--fps", type=int, default=2, help="frames a second of the files (default 2)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0 done, 1 failed with one message, 2 wrong usage."""
    asked = vars(parse(arguments))
    out, workers = asked.pop("out"), asked.pop("workers")
    try:
        corpus = Corpus(**asked)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        summary = write_corpus(corpus, out, workers)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for split, counted in summary["rows"].items():
        print(f"{split}: {sum(counted['by_source'].values())} rows in {out / split}.jsonl")
        for source, count in counted["by_source"].items():
            chance = counted["chance_level"].get(source)
            print(f"  {count:7d}  {source}" + (f"  (chance {chance:.1%})" if chance else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
