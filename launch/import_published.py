"""Turn a published fVLM file (`sanps/fVLM-135M`, `sanps/fVLM-1.7B`: `.pt` or `.safetensors`) into a model folder.

python launch/import_published.py model.pt --llm HuggingFaceTB/SmolLM2-135M-Instruct --vision facebook/dinov2-small \\
    --tokenizer HuggingFaceTB/SmolLM2-135M-Instruct --out imported/fvlm-135m
python launch/import_published.py model.pt --config geometry.json --tokenizer folder/with/tokenizer --out imported/mine

The file does not carry its geometry: --llm and --vision say it by the back bones' configurations (an id or a folder;
their weights are not read), --config by a JSON file with `llm` and `vision`, as their config.json, and any other field
of the model's configuration.

Exit code 0: done, 1: failed, 2: wrong usage or configuration.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fvlm.hub.card import write_card
from fvlm.hub.export import DTYPES, write_folder
from fvlm.hub.opening import processor_for
from fvlm.hub.published import geometry_of_backbones, read_geometry, read_published
from fvlm.schema import ConfigError


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="the published .pt or .safetensors file")
    parser.add_argument("--llm", help="Hugging Face id or folder of the language model, for its geometry")
    parser.add_argument("--vision", help="Hugging Face id or folder of the DINOv2 model, for its geometry")
    parser.add_argument("--config", type=Path, help="JSON file with the geometry, instead of --llm and --vision")
    parser.add_argument("--tokenizer", help="Hugging Face id or folder; default: --llm")
    parser.add_argument("--looks", type=int, default=8, help="visual tokens of a still; default: %(default)s")
    parser.add_argument("--name", help="title of the model card; default: the name of --out")
    parser.add_argument("--licence", help="of the weights, as the Hub abbreviates it, such as apache-2.0")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="of the weights in the new file")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist yet")
    args = parser.parse_args(arguments)
    if (args.config is None) == (args.llm is None or args.vision is None):
        parser.error("give either --config, or --llm and --vision")
    if args.looks < 1:
        parser.error(f"argument --looks: {args.looks}: expected at least 1")
    if args.tokenizer is None and args.llm is None:
        parser.error("--tokenizer: needed with --config")
    return args


def main(arguments: list[str] | None = None) -> int:
    """Parse, read, write, and turn what went wrong into one message and an exit code."""
    args = parse(arguments)
    try:
        geometry = read_geometry(args.config) if args.config else geometry_of_backbones(args.llm, args.vision)
        processor = processor_for(geometry, args.tokenizer or args.llm, args.looks)
        model = read_published(args.file, geometry)
        card = write_card(
            args.name or args.out.name, geometry, origin=args.file.name, licence=args.licence, looks=processor.looks
        )
        write_folder(args.out, model, processor, card, args.dtype)
    except (ValueError, OSError) as error:
        print(f"import_published: {error}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, ConfigError) else 1
    print(f"import_published: {args.file} as {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
