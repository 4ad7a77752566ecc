"""Blocks compiled once for all layers: the same numbers, one graph a shape, the same names; and packs on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from fvlm.model import FoveatedVLM, tiny_config
from fvlm.model.packed import SampleRows, assemble


def pack(seed: int, looks: int = 3, T: int = 96):
    """Three samples of random lengths, the second with `looks` at as many frames, and unused entries of every kind."""
    random = np.random.default_rng(seed)
    samples = []
    for place, length in enumerate(random.integers(12, 24, 3)):
        frame = np.full(length, -1)
        if place == 1:
            frame[4 : 4 + looks] = np.arange(looks)
        has_loss = (frame < 0) & (np.arange(length) > 7)
        samples.append(SampleRows(token_ids=random.integers(3, 200, length), frame=frame, has_loss=has_loss))
    frames = torch.from_numpy(random.integers(0, 256, (5, 3, 56, 56), dtype=np.uint8))
    return assemble(samples, frames, {"T": T, "V": 8, "C": 40, "S": 5, "K": 64}, 32)


def model() -> FoveatedVLM:
    torch.manual_seed(0)
    return FoveatedVLM(tiny_config(256)).train()


def gradients(net, batch):
    net.zero_grad()
    out = net(batch=batch)
    out.loss_sum.backward()
    return out.loss_sum.detach(), {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def check(backend: str, share: float) -> None:
    torch.compiler.reset()
    counters.clear()
    eager, compiled = model(), model()
    compiled.gradient_checkpointing_enable(encoder=share, llm=share)
    compiled.compile_blocks(backend)
    assert compiled.state_dict().keys() == eager.state_dict().keys()
    graphs = []
    for seed in range(3):
        (expected_loss, expected), (loss, found) = gradients(eager, pack(seed)), gradients(compiled, pack(seed))
        torch.testing.assert_close(loss, expected_loss)
        assert found.keys() == expected.keys()
        for name in expected:
            assert found[name].isfinite().all(), name
            torch.testing.assert_close(found[name], expected[name], rtol=2e-4, atol=2e-4, msg=name)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [graphs[0]] * 3  # other contents, the same graphs
    # two encoder blocks (the last one is shorter), a query block, a decoder layer over C and one over T rows
    assert graphs[0] == 5 or share
    torch.compiler.reset()


def test_one_graph_a_shape_and_the_same_gradients():
    check("aot_eager", 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_one_graph_a_shape_with_inductor(share):
    check("inductor", share)


@pytest.mark.parametrize("looks", [0, 3])
def test_what_is_unused_may_be_cut_off_or_stay(looks):
    batch = pack(7, looks)
    cut = batch.without_unused()
    cut.validate()
    assert len(cut.token_ids) == int(batch.cu_seqlens[-1]) < len(batch.token_ids)
    assert len(cut.frames) == max(looks, 1)
    assert len(cut.coarse_index) < len(batch.coarse_index)
    net, whole = model(), model()
    whole.compiled = True  # keeps the pack as it is
    (loss, found), (expected_loss, expected) = gradients(net, batch), gradients(whole, batch)
    torch.testing.assert_close(loss, expected_loss)
    assert found.keys() == expected.keys()  # looked at or not, every parameter has a gradient
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-4, msg=name)
