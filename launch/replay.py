"""Repeat one step of a run and look inside: whose samples, which losses, which gradients, what is not finite.

python launch/replay.py --run runs/demo --step 250
deepspeed --num_gpus 2 launch/replay.py --run runs/demo --step 250 --save gradients.safetensors --json step.json

Starts from the newest checkpoint before the step and writes nothing to the run's folder. With the run's own number of
ranks and its --ds_config, loss and gradient norm are the recorded ones, on a CPU bit for bit (docs/training.md).
Exit code 0: done, 1: failed, 2: wrong usage or configuration.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from safetensors.torch import save_file

from fvlm.config import load_config
from fvlm.data.errors import SampleError
from fvlm.schema import ConfigError
from fvlm.train.describe import write_json
from fvlm.train.engine import start_ranks, stop_ranks, world_from_environment
from fvlm.train.guard import DivergenceError
from fvlm.train.logs import start_logging
from fvlm.train.replay import replay, text
from fvlm.train.zero_config import read_zero_json


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, type=Path, help="folder of the run, with its config.yaml")
    parser.add_argument("--step", required=True, type=int, help="the step, as metrics.jsonl numbers them")
    parser.add_argument("--ds_config", default="zero2.json", help="the run's DeepSpeed JSON: a path, or a bare name")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the step's gradients as safetensors")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report as JSON")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    return parser.parse_args()


def main() -> int:
    """Parse, replay, show; what went wrong is one message and an exit code."""
    args = parse()
    world = world_from_environment()
    start_logging(world)
    try:
        if args.step < 1:
            raise ConfigError(f"--step {args.step}: expected 1 or more")
        config = load_config(str(args.run / "config.yaml"), [f"out={json.dumps(str(args.run))}"])
        zero = read_zero_json(args.ds_config)
        start_ranks()
        report, gradients = replay(config, zero, world, args.step)
        if world.is_main:
            print(text(report))
            if args.json is not None:
                write_json(args.json, report)
            if args.save is not None:
                save_file({name: gradient.cpu().contiguous() for name, gradient in gradients.items()}, args.save)
        stop_ranks()
    except (ConfigError, DivergenceError, SampleError, OSError) as error:
        if not world.is_main:  # rank 0 speaks first, and the launcher then ends the others
            time.sleep(5)
        print(f"replay: rank {world.rank}: {error}" if world.rank else f"replay: {error}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
