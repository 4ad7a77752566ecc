"""Packed causal attention against one sample, row and head at a time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fvlm.kernels.varlen_attention import varlen_attention
from tests.kernels.checks import worst
from tests.kernels.tolerances import BACKWARD, FORWARD


def brute_force(q, key, value, lengths):
    """Row by row with plain sums."""
    group = q.shape[1] // key.shape[1]
    rows, start = [], 0
    for length in lengths:
        for i in range(length):
            for head in range(q.shape[1]):
                past = slice(start, start + i + 1)
                p = ((key[past, head // group] * q[start + i, head]).sum(-1) / math.sqrt(q.shape[2])).softmax(0)
                rows.append((p[:, None] * value[past, head // group]).sum(0))
        start += length
    tail = q.new_zeros((len(q) - start) * q.shape[1], q.shape[2])
    return torch.cat([torch.stack(rows) if rows else tail[:0], tail]).view(q.shape)


def bounds(lengths, unused=0):
    ends = torch.tensor([0, *lengths]).cumsum(0)
    return torch.cat([ends, ends[-1:].expand(unused)]).int()


def inputs(num_rows, heads=4, kv_heads=2, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(num_rows, heads, width, generator=generator, dtype=torch.float64)
    key, value = torch.randn(2, num_rows, kv_heads, width, generator=generator, dtype=torch.float64)
    return q, key, value


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("lengths", "tail"), [([1], 0), ([3, 1, 7], 2), ([0, 5, 0, 2], 0), ([], 3), ([13], 1)])
def test_equals_brute_force_forward_and_backward(backend, dtype, lengths, tail, monkeypatch):
    monkeypatch.setenv("FVLM_KERNELS", backend)
    tensors = inputs(sum(lengths) + tail)
    exact = [x.to(dtype).double().requires_grad_() for x in tensors]
    given_ = [x.to(dtype).requires_grad_() for x in tensors]
    expected = brute_force(*exact, lengths)
    got = varlen_attention(*given_, bounds(lengths, unused=2), max_seqlen=16)
    name = str(dtype).removeprefix("torch.")
    assert got.dtype == dtype
    assert worst(got, expected) <= FORWARD[name]
    assert got[sum(lengths) :].abs().sum() == 0
    if lengths:
        upstream = torch.randn_like(expected)
        expected.backward(upstream)
        got.backward(upstream.to(dtype))
        for a, b in zip(given_, exact, strict=True):
            assert worst(a.grad, b.grad) <= BACKWARD[name]


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6), tail=st.integers(1, 4), unused=st.integers(0, 3))
def test_both_back_ends_agree_on_any_lengths(lengths, tail, unused):
    tensors = inputs(sum(lengths) + tail)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FVLM_KERNELS", "reference")
        reference = varlen_attention(*tensors, bounds(lengths, unused), 9)
        patch.setenv("FVLM_KERNELS", "torch")
        torch.testing.assert_close(
            varlen_attention(*tensors, bounds(lengths, unused), 9), reference, rtol=0, atol=1e-12
        )


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_nan_stays_in_its_sample(backend, monkeypatch):
    monkeypatch.setenv("FVLM_KERNELS", backend)
    q, key, value = inputs(12)
    clean = varlen_attention(q, key, value, bounds([4, 3, 4]), 4)
    for x in (q, key, value):
        x[5] = math.nan
    out = varlen_attention(q, key, value, bounds([4, 3, 4]), 4)
    assert torch.equal(out[:4], clean[:4])
    assert torch.equal(out[7:], clean[7:])
    assert out[5:7].isnan().all()


def test_gradients_are_right_to_second_order():
    q, key, value = (x.requires_grad_() for x in inputs(6, heads=2, kv_heads=1, width=4))
    assert torch.autograd.gradcheck(lambda *x: varlen_attention(*x, bounds([2, 3]), 3), (q, key, value))


def test_wrong_arguments_are_named(monkeypatch):
    q, key, value = inputs(6)
    with pytest.raises(ValueError, match="key must be"):
        varlen_attention(q, key[:, :1].expand(-1, 3, -1), value, bounds([6]), 6)
    with pytest.raises(ValueError, match="int32"):
        varlen_attention(q, key, value, bounds([6]).long(), 6)
    monkeypatch.setenv("FVLM_DEBUG", "1")
    for wrong in ([1, 6], [0, 4, 2], [0, 9]):
        with pytest.raises(ValueError, match="cu_seqlens"):
            varlen_attention(q, key, value, torch.tensor(wrong, dtype=torch.int32), 9)
    with pytest.raises(ValueError, match="max_seqlen"):
        varlen_attention(q, key, value, bounds([6]), 5)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_pack_without_samples_keeps_its_place_in_the_graph(backend, monkeypatch):
    """Ranks fill gradient buckets in the order of arrival, so an empty pack must give zero gradients, not none."""
    monkeypatch.setenv("FVLM_KERNELS", backend)
    tensors = [x.requires_grad_() for x in inputs(3)]
    out = varlen_attention(*tensors, bounds([0], unused=2), 4)
    assert out.abs().sum() == 0
    out.sum().backward()
    assert all(x.grad is not None and x.grad.abs().sum() == 0 for x in tensors)
