"""A page to look with: drop a video or a picture, ask, read the answer, and see where each token looked.

python launch/demo.py --model runs/demo
python launch/demo.py --model exported/demo --port 7861 --seconds 300

The page is served to this machine alone (127.0.0.1) until Ctrl-C or SIGTERM.
From elsewhere: ssh -L 7860:127.0.0.1:7860 HOST.
A dropped file is deleted once its frames were read. The page needs Gradio: pip install -e '.[demo]'.

Exit code 0: stopped, 1: failed, 2: wrong usage or configuration.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from fvlm.hub.demo import Viewer
from fvlm.hub.opening import open_model
from fvlm.schema import ConfigError
from launch.describe import at_least_one, device


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="exported folder, run folder (its best), checkpoint, hf:name")
    parser.add_argument("--port", type=at_least_one, help="default: the first free one from 7860")
    parser.add_argument(
        "--seconds", type=at_least_one, default=120, help="most to read a file, most to write an answer"
    )
    parser.add_argument("--tokenizer", help="tiny, a Hugging Face id or a folder; default: the model's")
    best = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=device, default=best, help="default: %(default)s")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Parse, open the model, serve until interrupted."""
    args = parse(arguments)
    try:
        from fvlm.hub.demo_page import served
    except ModuleNotFoundError as error:
        print(f"demo: {error}; the page needs Gradio: pip install -e '.[demo]'", file=sys.stderr, flush=True)
        return 1
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: uploads are deleted
    try:
        viewer = Viewer(open_model(args.model, args.tokenizer), args.device, args.seconds)
        with served(viewer, f"`{args.model}`", args.port) as address:
            print(f"demo: {address} (Ctrl-C stops it)", flush=True)
            threading.Event().wait()
    except KeyboardInterrupt:
        return 0
    except (ValueError, OSError, RuntimeError) as error:
        print(f"demo: {error}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, ConfigError) else 1
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


if __name__ == "__main__":
    sys.exit(main())
