"""Packing, padding, neighbours and recomputation must not change a sample's loss or gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fvlm.model import build_model, tiny_config
from fvlm.model.packed import SampleRows
from fvlm.model.padded import pack_padded
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


def test_the_padded_form_encodes_a_still_once_and_no_padding():
    model = make()
    frames = torch.randint(0, 256, (2, 4, 3, 56, 56), dtype=torch.uint8)
    frames[0] = frames[0, :1].clone()  # a still looked at four times; the other one is a video of three frames
    ids = torch.randint(3, VOCABULARY, (2, 5))
    padding = {"frame_mask": torch.tensor([[True] * 4, [True] * 3 + [False]])}
    batch = pack_padded(model.config, frames, ids, labels=ids, **padding).batch
    batch.validate()
    assert torch.equal(batch.frames, torch.cat([frames[0, :1], frames[1, :3]]))
    counts = np.arange(5) > 0
    rows = [
        SampleRows(
            token_ids=np.concatenate([np.zeros(n, int), text]),
            frame=np.concatenate([4 * b + np.arange(n), np.full(5, -1)]),
            has_loss=np.concatenate([np.zeros(n, bool), counts]),
        )
        for b, (n, text) in enumerate(zip((4, 3), ids.numpy(), strict=True))
    ]
    each_copy = pack(rows, frames.flatten(0, 1))
    for mode in ("coarse_fine", "autoregressive"):
        logprobs = model(frames, ids, labels=ids, mode=mode, **padding).logprobs
        torch.testing.assert_close(logprobs, model(batch=each_copy, mode=mode).logprobs, rtol=RELATIVE, atol=1e-10)


def test_labels_that_are_other_tokens_are_refused():
    model = make()
    frames, ids = torch.zeros(1, 1, 3, 56, 56, dtype=torch.uint8), torch.randint(3, VOCABULARY, (1, 5))
    labels = torch.where(torch.arange(5) < 3, -100, ids)
    mask = torch.tensor([[True] * 4 + [False]])
    labels[0, 4] = 0  # padding
    model(frames, ids, attention_mask=mask, labels=labels)
    labels[0, 3] = ids[0, 3] - 1
    said = rf"labels: expected input_ids' own tokens, or -100; labels\[0, 3\] is {labels[0, 3]}"
    with pytest.raises(ValueError, match=said):
        model(frames, ids, attention_mask=mask, labels=labels)
