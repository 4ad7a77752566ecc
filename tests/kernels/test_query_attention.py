"""Query attention against a loop over queries in float64."""

from __future__ import annotations

import math

import pytest
import torch

from fvlm.kernels.query_attention import query_attention
from fvlm.kernels.query_attention.reference import attention_weights
from tests.kernels.tolerances import BACKWARD, FORWARD


def brute_force(q, key, value, visual_frame):
    """One query and head at a time, with plain sums."""
    outs, lses, entropies = [], [], []
    for v, frame in enumerate(visual_frame.tolist()):
        for head in range(q.shape[1]):
            scores = (key[frame, :, head] * q[v, head]).sum(-1) / math.sqrt(q.shape[2])
            p = scores.exp() / scores.exp().sum()
            outs.append((p[:, None] * value[frame, :, head]).sum(0))
            lses.append(scores.exp().sum().log())
            entropies.append(-(p * p.log()).sum())
    shape = q.shape[:2]
    return torch.stack(outs).view(q.shape), torch.stack(lses).view(shape), torch.stack(entropies).view(shape)


def inputs(num_queries, num_frames, num_keys, heads=2, width=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(num_queries, heads, width, generator=generator, dtype=torch.float64)
    key, value = torch.randn(2, num_frames, num_keys, heads, width, generator=generator, dtype=torch.float64)
    frame = torch.randint(num_frames, (num_queries,), generator=generator).sort().values
    return q, key, value, frame


def worst(got, reference):
    """Largest error relative to the largest value; inputs are unit normal, so below 0.05 a value has cancelled."""
    got, reference = got.detach().double(), reference.detach().double()
    return float((got - reference).abs().max() / reference.abs().max().clamp(min=0.05))


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("queries", "frames", "keys"), [(1, 1, 1), (5, 3, 17), (9, 2, 257), (3, 7, 5)])
def test_equals_brute_force_forward_and_backward(backend, dtype, queries, frames, keys, monkeypatch):
    monkeypatch.setenv("FVLM_KERNELS", backend)
    q, key, value, frame = inputs(queries, frames, keys)
    exact = [x.to(dtype).double().requires_grad_() for x in (q, key, value)]
    given = [x.to(dtype).requires_grad_() for x in (q, key, value)]
    expected = brute_force(*exact, frame)
    got = query_attention(*given, frame)
    name = str(dtype).removeprefix("torch.")
    for a, b in zip(got, expected, strict=True):
        assert worst(a, b) <= FORWARD[name]
    upstream = torch.randn_like(expected[0])
    expected[0].backward(upstream)
    got[0].backward(upstream.to(dtype))
    for a, b in zip(given, exact, strict=True):
        assert worst(a.grad, b.grad) <= BACKWARD[name]


def test_a_frame_that_nobody_looks_at_gets_zero_gradient():
    q, key, value, _ = inputs(3, 4, 6)
    key.requires_grad_()
    frame = torch.tensor([0, 2, 2])
    query_attention(q, key, value, frame)[0].sum().backward()
    assert key.grad[1].abs().max() == 0
    assert key.grad[3].abs().max() == 0
    assert key.grad[2].abs().max() > 0


def test_heat_maps_are_the_weights_behind_the_output():
    q, key, value, frame = inputs(4, 2, 9)
    weights = attention_weights(q, key, frame)
    out = torch.einsum("vhn,vnhk->vhk", weights.double(), value[frame])
    torch.testing.assert_close(out, query_attention(q, key, value, frame)[0], rtol=1e-5, atol=1e-6)


def test_entropy_of_an_attention_that_underflows_is_finite():
    q, key, value, frame = inputs(2, 1, 8)
    _, _, entropy = query_attention(q * 1e4, key, value, frame)
    assert torch.isfinite(entropy).all()


def test_wrong_arguments_are_named(monkeypatch):
    q, key, value, frame = inputs(4, 2, 9)
    with pytest.raises(ValueError, match="value"):
        query_attention(q, key, value[:, 1:], frame)
    with pytest.raises(ValueError, match="visual_frame"):
        query_attention(q, key, value, frame.int())
    with pytest.raises(ValueError, match="float64 as q"):
        query_attention(q, key.float(), value.float(), frame)
    monkeypatch.setenv("FVLM_DEBUG", "1")
    with pytest.raises(ValueError, match="sorted"):
        query_attention(q, key, value, torch.tensor([1, 0, 1, 1]))
    with pytest.raises(ValueError, match=r"\[0, 2\)"):
        query_attention(q, key, value, torch.tensor([0, 0, 1, 2]))
