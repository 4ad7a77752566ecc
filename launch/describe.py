"""Ask a model about a video or a picture.

python launch/describe.py clip.mp4 --model runs/demo --ask "What happens in this video?"
python launch/describe.py photo.jpg --model exported/demo --ask "What is this?" --mode coarse_fine --new-tokens 32

A file is what its contents are: a video of any length (at most 64 frames of it are decoded), a still, an animation.

Exit code 0: answered, 1: failed, such as a file that cannot be read, 2: wrong usage or configuration.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from fvlm.data.chat import SOURCE_PROMPTS
from fvlm.hub.opening import OpenedModel, open_model
from fvlm.model.configuration import MODES
from fvlm.schema import ConfigError

ASK = SOURCE_PROMPTS["sharegpt4video"]


def at_least_one(text: str) -> int:
    """A count from the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least 1")
    return int(text)


def device(text: str) -> torch.device:
    """A device from the command line."""
    try:
        found = torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: expected cpu, cuda or cuda:N") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(f"{text!r}: torch sees no GPU here; expected cpu")
    return found


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("media", nargs="+", help="video or picture files; one answer a line for each")
    parser.add_argument("--model", required=True, help="exported folder, run folder (its best), checkpoint, hf:name")
    parser.add_argument("--ask", default=ASK, help=f"the question; default: {ASK!r}")
    parser.add_argument(
        "--mode",
        choices=MODES,
        help="how it looks; default: coarse_only where its run trained that, else autoregressive",
    )
    parser.add_argument("--fine-iterations", type=at_least_one, help="of coarse_fine; default: the run's first, or 1")
    parser.add_argument("--new-tokens", type=at_least_one, default=128, help="most tokens of an answer")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default: always the likeliest token")
    parser.add_argument("--seed", type=int, default=0, help="of the draws with a temperature above 0")
    parser.add_argument("--tokenizer", help="tiny, a Hugging Face id or a folder; default: the model's")
    best = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=device, default=best, help="default: %(default)s")
    args = parser.parse_args(arguments)
    if args.temperature < 0:
        parser.error(f"argument --temperature: {args.temperature}: expected 0 or more")
    return args


def answer(opened: OpenedModel, media: str, args: argparse.Namespace) -> str:
    """The model's answer about one file; raises MediaError for a file that cannot be read."""
    inputs = opened.processor(videos=media, text=args.ask).to(args.device)
    torch.manual_seed(args.seed)
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature else {"do_sample": False}
    tokens = opened.model.generate(
        **inputs,
        mode=args.mode or opened.default_mode,
        fine_iterations=args.fine_iterations or opened.fine_iterations,
        max_new_tokens=args.new_tokens,
        **sampling,
    )
    return opened.processor.decode(tokens[0], skip_special_tokens=True).strip()


def main(arguments: list[str] | None = None) -> int:
    """Parse, open, and answer about each file; one that cannot be read does not keep the others from their answer."""
    args = parse(arguments)
    failed = 0
    try:
        opened = open_model(args.model, args.tokenizer)
        opened.model.to(args.device)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"describe: {error}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, ConfigError) else 1
    for media in args.media:
        try:
            said = answer(opened, media, args)
        except (ValueError, OSError) as error:
            print(f"describe: {error}", file=sys.stderr, flush=True)
            failed += 1
            continue
        print(f"{media}: {said}" if len(args.media) > 1 else said, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
