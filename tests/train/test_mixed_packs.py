"""Ranks whose packs hold different things reduce the same gradients, in the same order.

ZeRO-2 fills its buckets in the order in which gradients arrive. A pack whose graph is cut short somewhere (no frames,
no samples) would not only let the other ranks wait: where the sizes happen to fit, it would add one parameter's
gradient to another's. So the comparison is of values, with one process that has all packs.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from spawned import run_ranks

from fvlm.config import RunConfig, load_config
from fvlm.data.batch import LoadedSample, collate
from fvlm.data.capacities import Capacities
from fvlm.data.chat import load_tokenizer, segments
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


def one_step(world: World, zero: str, overrides: list[str], folder: Path) -> list[tuple[float, dict]]:
    """Gradient norm and weights after one step, for each kind of second pack."""
    from fvlm.train import objectives

    train, results = config(*overrides).train, []
    for name, kinds in OTHER_PACKS.items():
        packs = [pack(["video", "text", "image"]), pack(kinds)]
        engine = Engine(
            load_model(config(*overrides), len(load_tokenizer("tiny"))), train, *read_zero_json(zero), world
        )
        for batch in packs[world.rank :: world.size]:
            loss = engine.forward(batch=batch, **objectives.call_arguments(train, 2)).loss_sum
            engine.backward(loss, planned=100)
        norm = engine.step(RATES)
        engine.write_weights(folder / name)
        results.append((norm, {n: p.detach().clone() for n, p in engine.module.named_parameters()}))
    return results


@pytest.mark.parametrize("zero", ["zero1", "zero2"])
@pytest.mark.parametrize("mode", ["coarse_fine", "coarse_only"])
def test_two_ranks_with_unlike_packs_step_as_one_process(zero, mode, tmp_path):
    overrides = [f"train.mode={mode}"]
    (expected,) = run_ranks(one_step, 1, zero, overrides, tmp_path / "one")
    for found in run_ranks(one_step, 2, zero, overrides, tmp_path / "two"):
        for name, (norm, weights), (other_norm, other) in zip(OTHER_PACKS, expected, found, strict=True):
            assert other_norm == pytest.approx(norm, rel=1e-5), name
            moved = max(float((value - other[n]).abs().max()) for n, value in weights.items())
            assert moved < 1e-4, (name, moved)  # Adam's first step moves every weight by its rate, 1e-3
            torch.testing.assert_close(weights["q_static"], other["q_static"], rtol=0, atol=1e-5)
