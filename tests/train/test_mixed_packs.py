"""Ranks whose packs hold different things reduce the same gradients, in the same order.

ZeRO-2 fills its buckets in the order in which gradients arrive. A pack whose graph is cut short somewhere (no frames,
no samples) would not only let the other ranks wait: where the sizes happen to fit, it would add one parameter's
gradient to another's. So the comparison is of values, with one process that has all packs.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
from spawned import run_ranks

from fvlm.config import RunConfig, load_config
from fvlm.data.batch import LoadedSample, collate
from fvlm.data.capacities import Capacities
from fvlm.data.chat import load_tokenizer, segments
from fvlm.train import objectives
from fvlm.train.build import load_model
from fvlm.train.engine import Engine, World
from fvlm.train.zero_config import read_zero_json

CAPACITIES = Capacities(frames=12, tokens=256, visual=32, coarse=64, samples=4, labels=256, max_seqlen=128)
RATES = {"connector": 1e-3, "dino": 1e-3, "llm": 1e-3}
KINDS = {
    "video": {"kind": "video", "frame_count": 3, "user": "What?", "assistant": "a red square"},
    "image": {"kind": "image", "frame_count": 1, "user": "Who?", "assistant": "nobody"},
    "text": {"kind": "text", "frame_count": 0, "user": "Say b.", "assistant": "b"},
}
RUNS = [("coarse_fine", "zero1"), ("coarse_fine", "zero2"), ("coarse_only", "zero2")]
OTHER_PACKS = {"text only": ["text", "text"], "empty": [], "one still": ["image"]}


def pack(kinds: list[str]):
    tokenizer, random = load_tokenizer("tiny"), np.random.default_rng(0)
    samples = [
        LoadedSample(
            key=kind,
            segments=segments({"source": "s", **KINDS[kind]}, tokenizer, layout=0, looks=8),
            frames=random.integers(0, 255, (KINDS[kind]["frame_count"], 3, 56, 56)).astype(np.uint8),
            source_id=0,
        )
        for kind in kinds
    ]
    return collate(samples, CAPACITIES, "ce_all", 56)


def config(*overrides: str) -> RunConfig:
    return load_config("tiny_test", ["data.train=[x]", "train.clip=0", *overrides])


def one_step(world: World, folder: Path) -> dict[tuple, tuple[float, dict]]:
    """Gradient norm and weights after one step, for every mode, ZeRO stage and kind of second pack."""
    results, vocab_size = {}, len(load_tokenizer("tiny"))
    for (mode, zero), (name, kinds) in product(RUNS, OTHER_PACKS.items()):
        run = config(f"train.mode={mode}")
        packs = [pack(["video", "text", "image"]), pack(kinds)]
        engine = Engine(load_model(run, vocab_size), run.train, *read_zero_json(zero), world)
        for batch in packs[world.rank :: world.size]:
            loss = engine.forward(batch=batch, **objectives.call_arguments(run.train, 2)).loss_sum
            engine.backward(loss, planned=100)
        norm = float(engine.step(RATES))
        results[mode, zero, name] = norm, {n: p.detach().clone() for n, p in engine.module.named_parameters()}
    return results


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """Results of one process, and of the first of two ranks."""
    folder = tmp_path_factory.mktemp("steps")
    return run_ranks(one_step, 1, folder)[0], run_ranks(one_step, 2, folder)[0]


@pytest.mark.parametrize("name", OTHER_PACKS)
@pytest.mark.parametrize(("mode", "zero"), RUNS)
def test_two_ranks_with_unlike_packs_step_as_one_process(steps, mode, zero, name):
    (norm, weights), (other_norm, other) = (found[mode, zero, name] for found in steps)
    assert other_norm == pytest.approx(norm, rel=1e-5)
    moved = max(float((value - other[n]).abs().max()) for n, value in weights.items())
    assert moved < 1e-4  # Adam's first step moves every weight by its rate, 1e-3
