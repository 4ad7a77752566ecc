"""Train a model: configuration and shards in; checkpoints, records and a summary out.

deepspeed launch/train.py --config demo --ds_config zero2.json
deepspeed --num_gpus 2 launch/train.py --config demo --ds_config zero2.json train.seed=7 --out runs/seed7
python launch/train.py --config demo data.num_workers=0          (one rank, no launcher)

The same command again continues an interrupted run. Exit code 0: done, 1: failed, 2: wrong usage or configuration,
75: told to stop (SIGTERM, SIGUSR1) and stopped, with a checkpoint.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fvlm.config import RunConfig, load_config, save_config
from fvlm.data.errors import SampleError
from fvlm.data.plan import PlanState
from fvlm.evaluate.during_training import validation, validation_pairs, validation_suite
from fvlm.schema import ConfigError
from fvlm.train.build import load_data, load_model, open_loader
from fvlm.train.checkpoint import CheckpointStore
from fvlm.train.describe import derived_numbers, run_summary, write_json
from fvlm.train.engine import Engine, World, start_ranks, stop_ranks, world_from_environment
from fvlm.train.guard import DivergenceError, EvaluationError
from fvlm.train.heartbeat import Heartbeat
from fvlm.train.logs import start_logging
from fvlm.train.loop import Trainer
from fvlm.train.metrics import open_writer
from fvlm.train.preemption import EXIT_CODE, Notice, Preempted
from fvlm.train.preflight import preflight
from fvlm.train.reference import TRAINING, VALIDATION, reference_logprobs
from fvlm.train.start import alone_in, find_start, seed_everything
from fvlm.train.zero_config import fill, read_zero_json, resolve_dtype, zero_stage


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="run YAML: a path, or a bare name in launch/configs")
    parser.add_argument("--ds_config", default="zero2.json", help="DeepSpeed JSON: a path, or a name in ds_configs")
    parser.add_argument("--out", help="folder of the run; default runs/<name>")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. train.total_samples=1e5")
    return parser.parse_intermixed_args()


def train(config: RunConfig, zero: tuple[dict, str], world: World, notice: Notice | None = None) -> None:
    """Build in a fixed order, resume, run, sum up, and be watched all the while."""
    with Heartbeat(world.rank, world.size) as heartbeat:
        _train(config, zero, world, heartbeat, notice or Notice())


def _train(config: RunConfig, zero: tuple[dict, str], world: World, heartbeat: Heartbeat, notice: Notice) -> None:
    dtype = resolve_dtype(config.train, world.device.type == "cuda")
    data = load_data(config, heartbeat.moving)
    store = CheckpointStore(config.folder / "checkpoints", world)
    state, checkpoint = find_start(config, data.identity(), world, zero_stage(zero[0], dtype), dtype, store)
    suite = validation_suite(config, data, world)
    reference: dict = {}
    if config.train.objective == "dpo":
        pairs = {TRAINING: data} | ({VALIDATION: validation_pairs(suite)} if suite else {})
        reference = reference_logprobs(config, pairs, world, checkpoint is not None, heartbeat)
    evaluate = validation(config, suite, world, reference.get(VALIDATION)) if suite else None
    model = load_model(config, len(data.tokenizer), checkpoint)
    engine = Engine(model, config.train, *zero, world)
    seed_everything(config.train.seed, world.rank)
    if checkpoint is not None:
        store.load(engine, checkpoint, state)
    if world.is_main:
        config.folder.mkdir(parents=True, exist_ok=True)
        save_config(config, config.folder / "config.yaml")
        for name, text in derived_numbers(config, data, engine, state).items():
            logging.info("%-8s %s", name, text)
    preflight(engine, config, data.plan.capacities, zero[0])
    with open_writer(config, state.run_id, state.step, state.last_evaluation, world.is_main) as writer:
        trainer = Trainer(engine, config, data.plan, state, store, writer, evaluate, heartbeat, notice)
        trainer.run(open_loader(config, data, world, PlanState(**state.plan), reference.get(TRAINING)))
    if world.is_main:
        write_json(config.folder / "run_summary.json", run_summary(config, data, engine, state))
        logging.info("done: %s", config.folder / "run_summary.json")


def main() -> int:
    """Parse, train, and turn what went wrong into one message and an exit code."""
    args = parse()
    world = world_from_environment()
    start_logging(world)
    try:
        config = load_config(args.config, [*args.overrides, *([f"out={args.out}"] if args.out else [])])
        zero = read_zero_json(args.ds_config)
        fill(*zero, config.train, world.size, resolve_dtype(config.train, world.device.type == "cuda"))
        start_ranks()
        with Notice() as notice, alone_in(config.folder, world):
            train(config, zero, world, notice)
        stop_ranks()
    except Preempted as stopped:
        stop_ranks()
        if world.is_main:
            print(f"train: {stopped}", file=sys.stderr, flush=True)
        return EXIT_CODE
    except (ConfigError, DivergenceError, EvaluationError, SampleError, OSError) as error:
        if not world.is_main:  # rank 0 speaks first, and the launcher then ends the others
            time.sleep(5)
        print(f"train: rank {world.rank}: {error}" if world.rank else f"train: {error}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
