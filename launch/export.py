"""Write a checkpoint as a Hugging Face folder that stands alone: weights, processor, code and model card.

python launch/export.py --checkpoint runs/demo --out exported/demo
python launch/export.py --checkpoint runs/demo/checkpoints/step-00000200 --out exported/demo-200 --licence apache-2.0

The folder works where only torch, transformers, Pillow and PyAV are installed:
    AutoModel.from_pretrained("exported/demo", trust_remote_code=True)

Exit code 0: done, 1: failed, 2: wrong usage or configuration.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fvlm.hub.card import write_card
from fvlm.hub.export import DTYPES, write_folder
from fvlm.hub.opening import open_model, run_records
from fvlm.schema import ConfigError


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="run folder (its best), checkpoint, model folder, hf:name")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist without --replace")
    parser.add_argument("--replace", action="store_true", help="let an export that lies at --out give way")
    parser.add_argument("--name", help="title of the model card; default: the name of --out")
    parser.add_argument("--tokenizer", help="tiny, a Hugging Face id or a folder; default: the run's")
    parser.add_argument("--licence", help="of the weights, as the Hub abbreviates it, such as apache-2.0")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="of the weights in the file")
    return parser.parse_args(arguments)


def export(args: argparse.Namespace) -> None:
    """Open, describe, write."""
    opened, records = open_model(args.checkpoint, args.tokenizer), run_records(args.checkpoint)
    processor = opened.processor
    card = write_card(
        args.name or args.out.name,
        opened.model.config,
        origin=opened.checkpoint.weights if records else Path(opened.checkpoint.weights).parent.name,
        run=records,
        licence=args.licence,
        looks=processor.looks,
        max_frames=processor.max_frames,
    )
    write_folder(args.out, opened.model, processor, card, args.dtype, args.replace)
    print(f"export: {opened.checkpoint.weights} as {args.out}")
    if records is None:
        print("export: no run beside these weights, so the model card has no figures")


def main(arguments: list[str] | None = None) -> int:
    """Parse, export, and turn what went wrong into one message and an exit code."""
    args = parse(arguments)
    try:
        export(args)
    except (ValueError, OSError) as error:
        print(f"export: {error}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
