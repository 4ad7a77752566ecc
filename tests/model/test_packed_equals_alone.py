"""Packing, padding, neighbours and recomputation must not change a sample's loss or gradient."""

from __future__ import annotations

import pytest
import torch

from fvlm.model import build_model, tiny_config
from tests.model.samples import alone, mixed, pack

VOCABULARY = 64
RELATIVE = 1e-10  # float64


def make(**overrides):
    torch.manual_seed(0)
    return build_model(tiny_config(VOCABULARY, **overrides)).double().train()


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_equal_up_to_rounding(got: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    scale = expected.abs().max().clamp(min=1e-3)  # gradients that cancel to zero have no scale of their own
    assert (got - expected).abs().max() <= RELATIVE * scale, name


@pytest.mark.parametrize(
    ("mode", "iterations", "overrides"),
    [
        ("coarse_fine", 1, {}),
        ("coarse_fine", 2, {}),
        ("coarse_only", 1, {}),
        ("coarse_fine", 1, {"deep_query": False}),
        ("coarse_fine", 1, {"query_logit_scale": "learnable"}),
    ],
    ids=["fine", "two iterations", "coarse", "shallow", "learnable temperature"],
)
def test_32_mixed_samples_packed_equal_one_by_one(mode, iterations, overrides):
    model = make(**overrides)
    _, rows, frames = mixed(32, VOCABULARY)
    out = model(batch=pack(rows, frames, spare=9), mode=mode, fine_iterations=iterations)
    out.loss_sum.backward()
    packed_loss, packed = out.loss_sum.item(), gradients_or_none(model)
    model.zero_grad(set_to_none=True)
    single = 0.0
    for row in rows:
        loss = model(batch=alone(row, frames), mode=mode, fine_iterations=iterations).loss_sum
        loss.backward()
        single += loss.item()
    assert packed_loss == pytest.approx(single, rel=RELATIVE)
    expected = gradients_or_none(model)
    assert expected.keys() == packed.keys()
    for name, grad in expected.items():
        assert_equal_up_to_rounding(packed[name], grad, name)


def gradients_or_none(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_every_trainable_parameter_gets_a_gradient_from_text_alone():
    model = make()
    _, rows, frames = mixed(6, VOCABULARY)
    model(batch=pack(rows[5:6], frames[:1])).loss_sum.backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    assert not model.encoder.dino.embeddings.mask_token.requires_grad


def test_activation_checkpointing_changes_no_bit():
    _, rows, frames = mixed(8, VOCABULARY)
    batch = pack(rows, frames, spare=2)
    results = []
    for recompute in (False, True):
        model = make().float()
        if recompute:
            model.gradient_checkpointing_enable()
        model(batch=batch).loss_sum.backward()
        results.append(gradients(model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_frozen_dino_keeps_the_loss_and_trains_the_rest():
    _, rows, frames = mixed(8, VOCABULARY)
    batch = pack(rows, frames)
    model = make()
    expected = model(batch=batch)
    expected.loss_sum.backward()
    reference = gradients(model)
    frozen = make()
    frozen.encoder.dino.requires_grad_(False)
    out = frozen(batch=batch)
    out.loss_sum.backward()
    assert out.loss_sum.item() == pytest.approx(expected.loss_sum.item(), rel=RELATIVE)
    for name, grad in gradients(frozen).items():
        assert_equal_up_to_rounding(grad, reference[name], name)


def test_unused_frames_and_a_neighbours_nan_stay_where_they_are():
    model = make()
    _, rows, frames = mixed(4, VOCABULARY)
    floats = frames.double() / 255
    clean = model(batch=pack(rows, floats)).logprobs
    broken = floats.clone()
    broken[1] = float("nan")  # a frame of the first sample
    out = model(batch=pack(rows, broken)).logprobs
    own = int(rows[0].has_loss.sum())
    assert out[:own].isnan().any()
    torch.testing.assert_close(out[own:], clean[own:], rtol=RELATIVE, atol=1e-12)
