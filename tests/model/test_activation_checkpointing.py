"""Blocks that the backward pass computes again: which ones, that nothing changes, and under torch.compile."""

from __future__ import annotations

import pytest
import torch

from fvlm.model import build_model, tiny_config
from fvlm.model.base import spread
from tests.model.samples import mixed, pack

VOCABULARY = 64
SHARES = [(1.0, 1.0), (0.0, 1.0), (1.0, 0.0), (0.5, 0.25)]


def model(**overrides):
    torch.manual_seed(0)
    return build_model(tiny_config(VOCABULARY, **overrides)).train()


def batch():
    _, rows, frames = mixed(8, VOCABULARY)
    return pack(rows, frames, spare=2)


def gradients(net, run=None) -> dict[str, torch.Tensor]:
    loss = (net if run is None else run)(batch=batch(), fine_iterations=2).loss_sum
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad for n, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("shares", SHARES)
def test_no_bit_changes(shares):
    expected, net = gradients(model()), model()
    net.gradient_checkpointing_enable(encoder=shares[0], llm=shares[1])
    found = gradients(net)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("count", "share", "chosen"),
    [(4, 0.0, []), (4, 1.0, [0, 1, 2, 3]), (4, 0.5, [1, 3]), (6, 1 / 3, [2, 5]), (4, 0.75, [1, 2, 3]), (3, 0.5, [1])],
)
def test_chosen_blocks_are_spread_evenly(count, share, chosen):
    assert [i for i, again in enumerate(spread(count, share)) if again] == chosen


@pytest.mark.parametrize("shares", [(0.5, 0.25), (1.0, 0.5), (0.0, 0.0)])
def test_only_the_chosen_blocks_run_twice(shares):
    net = model()
    net.gradient_checkpointing_enable(encoder=shares[0], llm=shares[1])
    runs = {"encoder": [0] * 4, "llm": [0] * 4}
    for part, layers in (("encoder", net.encoder.dino.encoder.layer), ("llm", net.llm.model.layers)):
        for index, layer in enumerate(layers):
            inner = layer.norm1 if part == "encoder" else layer.input_layernorm
            inner.register_forward_hook(lambda *_, p=part, i=index: runs[p].__setitem__(i, runs[p][i] + 1))
    net(batch=batch()).loss_sum.backward()
    plain = {"encoder": 2, "llm": 2}  # frames and queries; coarse and fine pass
    for part, share in zip(("encoder", "llm"), shares, strict=True):
        again = 1 if part == "encoder" else 2  # a query's way through the encoder is not recomputed
        assert runs[part] == [plain[part] + again * chosen for chosen in spread(4, share)]


def test_a_share_outside_of_0_to_1_is_refused():
    with pytest.raises(ValueError, match=r"llm=1\.5"):
        model().gradient_checkpointing_enable(llm=1.5)
    with pytest.raises(ValueError, match="non-reentrant"):
        model().gradient_checkpointing_enable({"use_reentrant": True})


def test_a_frozen_encoder_has_nothing_to_recompute():
    net = model()
    for parameter in net.encoder.dino.parameters():
        parameter.requires_grad_(False)
    net.gradient_checkpointing_enable()
    runs = []
    net.encoder.dino.encoder.layer[0].norm1.register_forward_hook(lambda *_: runs.append(1))
    net(batch=batch()).loss_sum.backward()
    assert len(runs) == 3  # frames; the coarse query, which does not ride then; the fine queries
    assert net.llm.model.layers[0].mlp.up_proj.weight.grad.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("shares", [(1.0, 1.0), (0.5, 0.5)])
def test_compiled_without_nan(backend, shares):
    expected, net = gradients(model()), model()
    net.gradient_checkpointing_enable(encoder=shares[0], llm=shares[1])
    found = gradients(net, torch.compile(net, backend=backend))
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].isfinite().all(), name
        torch.testing.assert_close(found[name], expected[name], rtol=2e-4, atol=2e-5, msg=name)
