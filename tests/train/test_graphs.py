"""Passes recorded once and replayed: on the CPU with a recorder that runs the function again, on a GPU with graphs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fvlm.config import load_config
from fvlm.model import FoveatedVLM, build_model, tiny_config
from fvlm.model.packed import PackedBatch, SampleRows, assemble
from fvlm.schema import ConfigError
from fvlm.train import graphs
from fvlm.train.graphs import GraphedPass, graphed, require_graphs

SIZES = {"T": 80, "V": 8, "C": 40, "S": 4, "K": 60}


def pack(seed: int) -> PackedBatch:
    random = np.random.default_rng(seed)
    samples = []
    for place, length in enumerate(random.integers(12, 24, 3)):
        frame = np.full(length, -1)
        frame[4:7] = np.arange(3) if place == 1 else -1
        has_loss = (frame < 0) & (np.arange(length) > 7)
        samples.append(SampleRows(token_ids=random.integers(3, 200, length), frame=frame, has_loss=has_loss))
    frames = torch.from_numpy(random.integers(0, 256, (4, 3, 56, 56), dtype=np.uint8))
    return assemble(samples, frames, SIZES, 32)


def model(dtype: torch.dtype = torch.float64) -> FoveatedVLM:
    torch.manual_seed(0)
    return build_model(tiny_config(256)).to(dtype).train()


def run_again(function):
    """A recorder for the CPU: what a graph would do again on the device, the function does again."""
    function()
    return function


def accumulated(net, packs, device="cpu", **arguments):
    """Loss sums of the packs, and gradients summed over them."""
    net.zero_grad()
    losses = []
    for batch in packs:
        out = net(batch=batch.to(device), **arguments)
        (out.loss_sum + 0.1 * (out.logprobs**2).sum()).backward()  # both ways that objectives take
        losses.append(out.loss_sum.detach().clone())
    return losses, {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def same(first, second, **tolerance) -> None:
    torch.testing.assert_close(first[0], second[0], **tolerance)
    assert first[1].keys() == second[1].keys()
    for name, gradient in first[1].items():
        torch.testing.assert_close(gradient, second[1][name], **tolerance, msg=name)


@pytest.fixture
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(graphs, "recorder", lambda device: run_again)


def test_replayed_passes_are_the_eager_ones_summed_over_micro_batches(on_the_cpu):
    packs = [pack(seed) for seed in range(4)]
    eager, replayed = model(), model()
    graphed(replayed, torch.device("cpu"))
    for arguments in ({"mode": "coarse_fine"}, {"mode": "coarse_fine", "fine_iterations": 2}, {"mode": "coarse_only"}):
        for step in (packs[:2], packs[2:]):
            same(accumulated(replayed, step, **arguments), accumulated(eager, step, **arguments), rtol=0, atol=1e-12)


def test_a_replay_leaves_earlier_results_alone(on_the_cpu):
    net = model()
    graphed(net, torch.device("cpu"))
    out = net(batch=pack(0))
    out.loss_sum.backward()
    kept = out.logprobs.detach(), net.q_init.grad  # as accumulation keeps it: without a copy
    copies = [x.clone() for x in kept]
    net.zero_grad()
    net(batch=pack(1)).loss_sum.backward()
    for before, after in zip(copies, kept, strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_passes_without_gradients_are_not_recorded(on_the_cpu, monkeypatch):
    net = model()
    graphed(net, torch.device("cpu"))
    monkeypatch.setattr(graphs, "GraphedPass", None)  # would fail if it were called
    with torch.no_grad():
        expected = net(batch=pack(0)).loss_sum
    torch.testing.assert_close(net.eval()(batch=pack(0)).loss_sum.detach(), expected)


def test_what_was_not_recorded_is_refused():
    net = model()
    passes = GraphedPass(lambda batch: net(batch=batch), net, pack(0), run_again)
    with pytest.raises(RuntimeError, match="another shape"):
        passes(replace(pack(1), token_ids=torch.zeros(81, dtype=torch.int64)))
    net.q_init.data = net.q_init.data.clone()
    with pytest.raises(RuntimeError, match="moved"):
        passes(pack(1))


def test_runs_that_cannot_be_recorded_are_refused():
    train = load_config("tiny_test", ["data.train=[x]"]).train
    gpu = torch.device("cuda")
    require_graphs(train, 2, "zero2", gpu)
    for change, stage, device, message in (
        ({}, 2, torch.device("cpu"), "train.cuda_graphs = true: this run is on cpu"),
        ({}, 3, gpu, "zero3 asks for ZeRO-3"),
        ({"activation_checkpointing": True}, 2, gpu, "activation_checkpointing"),
    ):
        with pytest.raises(ConfigError, match=message):
            require_graphs(replace(train, **change), stage, f"zero{stage}", device)


@pytest.mark.gpu
def test_graphs_on_a_gpu():
    device = torch.device("cuda")
    packs = [pack(seed) for seed in range(4)]
    eager, replayed = model(torch.float32).to(device), model(torch.float32).to(device)
    graphed(replayed, device)
    for step in (packs[:2], packs[2:]):
        same(accumulated(replayed, step, device), accumulated(eager, step, device), rtol=1e-5, atol=1e-5)
