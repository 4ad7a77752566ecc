"""Head and cross-entropy against plain float64 sums."""

from __future__ import annotations

import pytest
import torch

from fvlm.kernels.linear_cross_entropy import linear_cross_entropy
from fvlm.kernels.linear_cross_entropy import reference as implementation
from tests.kernels.checks import worst
from tests.kernels.tolerances import BACKWARD, FORWARD


def brute_force(hidden, weight, labels):
    """Log-probabilities row by row."""
    rows = []
    for h, label in zip(hidden, labels.tolist(), strict=True):
        scores = weight @ h
        rows.append(scores[label] - scores.exp().sum().log() if label != -100 else scores.sum() * 0)
    return torch.stack(rows)


def inputs(rows=11, width=8, vocabulary=23):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64)
    labels = torch.randint(vocabulary, (rows,), generator=generator)
    labels[::3] = -100
    return hidden, weight, labels


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("rows_at_once", [4, 2048])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_equals_brute_force_forward_and_backward(backend, rows_at_once, dtype, monkeypatch):
    monkeypatch.setenv("FVLM_KERNELS", backend)
    monkeypatch.setattr(implementation, "ROWS_AT_ONCE", rows_at_once)
    hidden, weight, labels = inputs()
    exact = [x.to(dtype).double().requires_grad_() for x in (hidden, weight)]
    given = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
    expected = brute_force(*exact, labels)
    got = linear_cross_entropy(*given, labels)
    name = str(dtype).removeprefix("torch.")
    assert worst(got.logprobs, expected) <= FORWARD[name]
    assert worst(got.loss_sum, -expected.sum()) <= FORWARD[name]
    assert int(got.num_labels) == int((labels != -100).sum())
    upstream = torch.randn_like(expected)  # every token its own factor, as DPO needs
    expected.backward(upstream)
    got.logprobs.backward(upstream.to(got.logprobs.dtype))
    for a, b in zip(given, exact, strict=True):
        assert worst(a.grad, b.grad) <= BACKWARD[name]


def test_rows_without_label_change_nothing():
    hidden, weight, labels = inputs()
    hidden.requires_grad_()
    out = linear_cross_entropy(hidden, weight, labels)
    out.loss_sum.backward()
    assert (out.logprobs[labels == -100] == 0).all()
    assert (hidden.grad[labels == -100] == 0).all()


def test_no_label_at_all_gives_zero_loss_and_gradient():
    hidden, weight, labels = inputs()
    hidden.requires_grad_()
    out = linear_cross_entropy(hidden, weight, torch.full_like(labels, -100))
    out.loss_sum.backward()
    assert out.loss_sum == 0
    assert hidden.grad.abs().max() == 0


def test_wrong_arguments_are_named():
    hidden, weight, labels = inputs()
    with pytest.raises(ValueError, match="weight"):
        linear_cross_entropy(hidden, weight[:, 1:], labels)
    with pytest.raises(ValueError, match="labels"):
        linear_cross_entropy(hidden, weight, labels[1:])
