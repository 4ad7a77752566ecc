"""The worst-case pack before the first step: full, without a trace, and a clear message where it does not fit."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from launched import ROOT, arguments
from spawned import run_ranks

from fvlm.config import load_config
from fvlm.data.capacities import Capacities
from fvlm.model import build_model, tiny_config
from fvlm.schema import ConfigError
from fvlm.train import preflight as module
from fvlm.train.checkpoint import random_state
from fvlm.train.engine import Engine
from fvlm.train.preflight import preflight, worst_case_pack
from fvlm.train.zero_config import read_zero_json
from tests.model.samples import mixed, pack

VOCABULARY = 64
SMALL = Capacities(frames=12, tokens=256, visual=24, coarse=48, samples=4, labels=128, max_seqlen=100)
RATES = {"connector": 1e-3, "dino": 1e-3, "llm": 1e-3}


@pytest.mark.parametrize(
    "changes",
    [{}, {"visual": 120, "coarse": 200}, {"frames": 3}, {"max_seqlen": 256}, {"max_seqlen": 64}, {"labels": 256}],
)
def test_the_pack_is_full(changes):
    capacities = replace(SMALL, **changes)
    batch = worst_case_pack(tiny_config(VOCABULARY), capacities)
    batch.validate()
    lengths = batch.cu_seqlens.diff()
    assert int(lengths.max()) == capacities.max_seqlen
    assert int(batch.cu_seqlens[-1]) == capacities.tokens
    assert (batch.visual_index < capacities.tokens).all()  # every look is used
    assert set(batch.visual_frame.tolist()) == set(range(capacities.frames))  # at every frame
    text = capacities.tokens - capacities.visual - len(lengths[lengths > 0])
    assert int((batch.labels >= 0).sum()) == min(capacities.labels, text)
    assert int(batch.coarse_cu_seqlens[-1]) >= capacities.visual


def test_the_pack_of_the_baseline_names_cells():
    geometry = tiny_config(VOCABULARY, architecture="multi_token", grid=4)
    batch = worst_case_pack(geometry, SMALL)
    batch.validate()
    assert set(batch.visual_cell.tolist()) == {0, 1, 2, 3}
    assert build_model(geometry)(batch=batch).loss_sum.isfinite()


def settings(wanted: bool | None):
    config = load_config("tiny_test")
    return replace(config, train=replace(config.train, packs_per_step=4, clip=1.0, preflight=wanted))


def trained(world, name: str, wanted: bool):
    """This rank's share of a checkpoint after three steps, and whether random states were left alone."""
    config = settings(wanted)
    torch.manual_seed(0)
    zero, origin = read_zero_json(name)
    engine = Engine(build_model(tiny_config(VOCABULARY)).train(), config.train, zero, origin, world)
    before = random_state()["torch"]
    preflight(engine, config, SMALL, zero)
    untouched = torch.equal(before, random_state()["torch"])
    _, rows, frames = mixed(8, VOCABULARY)
    for _ in range(3):
        for _ in range(engine.accumulation):
            engine.backward(engine.forward(batch=pack(rows, frames)).loss_sum, 100)
        engine.step(RATES)
    return engine.snapshot(), untouched


def compare(world, names):
    """Name → whether masters, moments, Adam's steps and DeepSpeed's counters are the same with and without it."""
    found = {}
    for name in names:
        (plain, _), (checked, untouched) = (trained(world, name, wanted) for wanted in (False, True))
        same = all(torch.equal(plain.tensors[kind], checked.tensors[kind]) for kind in plain.tensors)
        steps = {step for *_, step in checked.pieces}
        found[name] = (same, untouched, plain.pieces == checked.pieces, plain.common == checked.common, steps)
    return found


TWO_RANKS = pytest.param(2, ["zero0", "zero1", "zero2", "zero3"], marks=pytest.mark.slow)


@pytest.mark.parametrize(("ranks", "names"), [(1, ["zero2"]), TWO_RANKS])
def test_nothing_is_left_behind(ranks, names):
    for found in run_ranks(compare, ranks, names):
        assert found == dict.fromkeys(names, (True, True, True, True, {3}))


class OutOfRoom:
    """An engine whose forward pass runs out of memory."""

    dtype, accumulation = "fp32", 1

    def __init__(self):
        from fvlm.train.engine import World

        self.world = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
        self.module = build_model(tiny_config(VOCABULARY))

    def rehearsal(self):
        import contextlib

        return contextlib.nullcontext()

    def forward(self, **_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_running_out_of_memory_names_capacities_that_fit(monkeypatch):
    engine, zero = OutOfRoom(), read_zero_json("zero2")[0]
    monkeypatch.setattr(module, "memory_of", lambda device: 3 * 2**30)
    monkeypatch.setattr(module, "predict", lambda geometry, tried, *_, **__: {"all": tried.tokens / 100 * 2**30})
    with pytest.raises(ConfigError) as caught:
        preflight(engine, settings(True), replace(SMALL, tokens=400, frames=16), zero)
    message = str(caught.value)
    assert "data.tokens = 400" in message
    assert "does not fit into 3.0 GiB (predicted: 4.0 GiB; CUDA out of memory." in message
    assert "Predicted to fit: data.tokens=300 data.frames=12" in message
    assert "train.activation_checkpointing=true" in message
    assert "zero2_offload.json" in message


def test_a_prediction_that_was_too_low_is_corrected_by_what_was_seen(monkeypatch):
    engine, zero = OutOfRoom(), read_zero_json("zero2")[0]
    monkeypatch.setattr(module, "memory_of", lambda device: 3 * 2**30)
    monkeypatch.setattr(module, "predict", lambda geometry, tried, *_, **__: {"all": tried.tokens / 400 * 2**30})
    with pytest.raises(ConfigError, match=r"data\.tokens=350 "):  # as if the whole had taken 3.06 GiB
        preflight(engine, settings(True), replace(SMALL, tokens=400), zero)
    monkeypatch.setattr(module, "predict", lambda *_, **__: {"all": 4 * 2**30})
    with pytest.raises(ConfigError, match=r"No smaller pack is predicted to fit.*launch/plan.py"):
        preflight(engine, settings(True), SMALL, zero)


@pytest.mark.slow
def test_the_real_prediction_gives_smaller_capacities(monkeypatch):
    engine, zero = OutOfRoom(), read_zero_json("zero2")[0]
    _, whole = module.capacities_that_fit(engine, settings(True), SMALL, zero, 1e12)
    found, again = module.capacities_that_fit(engine, settings(True), SMALL, zero, 0.99 * whole)
    assert again == whole
    assert found.tokens < SMALL.tokens


def test_another_error_stays_what_it_is():
    engine = OutOfRoom()
    engine.forward = lambda **_: (_ for _ in ()).throw(RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        preflight(engine, settings(True), SMALL, {})


def test_on_a_cpu_it_runs_where_it_is_asked_for():
    preflight(OutOfRoom(), settings(None), SMALL, {})
    preflight(OutOfRoom(), settings(False), SMALL, {})


FAILING = """
import sys, torch
import fvlm.train.preflight as preflight
def out_of_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory.")
preflight._run = out_of_memory
from launch import train
sys.exit(train.main())
"""


def test_a_run_that_does_not_fit_ends_with_2_before_its_first_step(shards, tmp_path):
    command = arguments(shards, tmp_path / "out", "train.preflight=true")
    done = subprocess.run(
        [sys.executable, "-c", FAILING, *command], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "train: out of memory: the worst-case pack" in done.stderr
    assert not (tmp_path / "out" / "metrics.csv").exists()
