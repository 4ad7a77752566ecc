"""Packed causal attention against one sample, row and head at a time."""

from __future__ import annotations

import math
from contextlib import ExitStack

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fvlm.kernels.launching import Tiles, forced, recording
from fvlm.kernels.varlen_attention import varlen_attention
from tests.kernels.checks import (
    assert_close,
    backward_tolerance,
    device_for_triton,
    forward_tolerance,
    in_dtype,
)

BACKENDS = ["triton", "torch", "reference"]
HALF_AND_FULL = [torch.float32, torch.bfloat16, torch.float16]


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


def bounds(lengths, unused=0, device="cpu"):
    ends = torch.tensor([0, *lengths]).cumsum(0)
    return torch.cat([ends, ends[-1:].expand(unused)]).int().to(device)


def inputs(num_rows, heads=4, kv_heads=2, width=8, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(num_rows, heads, width, generator=generator, dtype=torch.float64)
    key, value = torch.randn(2, num_rows, kv_heads, width, generator=generator, dtype=torch.float64)
    return [x.to(device) for x in (q, key, value)]


def leaves(*shape, dtype=torch.float32, **sizes):
    """Inputs where Triton runs."""
    return [x.to(dtype).requires_grad_() for x in inputs(*shape, **sizes, device=device_for_triton())]


def run(tensors, lengths, unused=0, attend=varlen_attention):
    """The output and the gradients of its sum with fixed weights; the tail's weights are not zero."""
    out = attend(*tensors, bounds(lengths, unused, tensors[0].device), max([1, *lengths]))
    weights = torch.arange(out.numel(), device=out.device).view(out.shape).to(torch.float32).sin().to(out.dtype)
    return [out, *torch.autograd.grad(out, tensors, weights)]


def assert_equal_bits(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def small_tiles(block_m, block_n):
    """Every kernel with the same small tiles, so that short samples have many."""
    stack = ExitStack()
    for kernel in ("fwd", "bwd_dq", "bwd_dkv"):
        stack.enter_context(forced(f"varlen_attention_{kernel}", Tiles({"BLOCK_M": block_m, "BLOCK_N": block_n}, 4, 2)))
    return stack


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, *HALF_AND_FULL], ids=str)
@pytest.mark.parametrize(("lengths", "tail"), [([1], 0), ([3, 1, 7], 2), ([0, 5, 0, 2], 0), ([], 3), ([13], 1)])
def test_equals_brute_force_forward_and_backward(backend, dtype, lengths, tail, monkeypatch):
    monkeypatch.setenv("FVLM_KERNELS", backend)
    tensors = inputs(sum(lengths) + tail, device=device_for_triton() if backend == "triton" else "cpu")
    exact, given_ = in_dtype(tensors, dtype)
    cu_seqlens = bounds(lengths, 2, tensors[0].device)
    if backend == "triton" and dtype == torch.float64:
        with pytest.raises(RuntimeError, match="not float64"):
            varlen_attention(*given_, cu_seqlens, max_seqlen=16)
        return
    expected = brute_force(*exact, lengths)
    got = varlen_attention(*given_, cu_seqlens, max_seqlen=16)
    assert got.dtype == dtype
    assert_close("out", [got], [expected], forward_tolerance(dtype))
    assert got[sum(lengths) :].abs().sum() == 0
    if lengths:
        upstream = torch.randn_like(expected)
        expected.backward(upstream)
        got.backward(upstream.to(dtype))
        gradients = ([x.grad for x in leaves] for leaves in (given_, exact))
        assert_close("q key value", *gradients, backward_tolerance(dtype))
        assert all(x.grad[sum(lengths) :].abs().sum() == 0 for x in given_)


@settings(max_examples=12, deadline=None)
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


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 70), max_size=4),
    tail=st.integers(0, 40),
    unused=st.integers(0, 3),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    width=st.sampled_from([1, 8, 16, 24, 64]),
    blocks=st.sampled_from([(16, 16), (16, 64), (64, 16), (32, 32)]),
    dtype=st.sampled_from(HALF_AND_FULL),
)
def test_triton_on_any_shape(lengths, tail, unused, kv_heads, group, width, blocks, dtype):
    """Results and gradients against the definition in float64; tiles of every proportion, samples of many."""
    num_rows = max(1, sum(lengths) + tail)
    tensors = inputs(num_rows, kv_heads * group, kv_heads, width, device=device_for_triton())
    exact, given_ = in_dtype(tensors, dtype)
    with pytest.MonkeyPatch.context() as patch, small_tiles(*blocks):
        patch.setenv("FVLM_KERNELS", "reference")
        expected = run(exact, lengths, unused)
        patch.setenv("FVLM_KERNELS", "triton")
        got = run(given_, lengths, unused)
    assert_close("out", got[:1], expected[:1], forward_tolerance(dtype))
    assert_close("q key value", got[1:], expected[1:], backward_tolerance(dtype))
    assert all(x[sum(lengths) :].abs().sum() == 0 for x in got)


@pytest.mark.parametrize("width", [80, 96, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wide_heads(width, dtype, monkeypatch):
    exact, given_ = in_dtype(inputs(85, 2, 1, width, device=device_for_triton()), dtype)
    monkeypatch.setenv("FVLM_KERNELS", "reference")
    expected = run(exact, [70, 13])
    monkeypatch.setenv("FVLM_KERNELS", "triton")
    got = run(given_, [70, 13])
    assert_close("out", got[:1], expected[:1], forward_tolerance(dtype))
    assert_close("q key value", got[1:], expected[1:], backward_tolerance(dtype))


def test_heads_beyond_the_tiles_are_refused(triton):
    with pytest.raises(RuntimeError, match="up to 128, not 136"):
        varlen_attention(*leaves(3, width=136), bounds([3]).to(device_for_triton()), 3)


@pytest.mark.slow
def test_hundreds_of_samples(monkeypatch):
    """Most of them empty, at the start, between others and at the end."""
    lengths = [0] * 90 + [1, 0, 2, 20] * 3 + [0] * 150 + [17]
    exact, given_ = in_dtype(inputs(sum(lengths) + 5, 1, 1, 16, device=device_for_triton()), torch.float32)
    monkeypatch.setenv("FVLM_KERNELS", "reference")
    expected = run(exact, lengths)
    monkeypatch.setenv("FVLM_KERNELS", "triton")
    got = run(given_, lengths, unused=50)
    assert_close("out", got[:1], expected[:1], forward_tolerance(torch.float32))
    assert_close("q key value", got[1:], expected[1:], backward_tolerance(torch.float32))


def test_two_runs_give_the_same_bits(triton):
    tensors = leaves(150, 6, 2, 40, dtype=torch.bfloat16)
    assert_equal_bits(run(tensors, [70, 3, 60]), run(tensors, [70, 3, 60]))


def test_views_are_read_in_place(triton):
    """As layers hand them over, heads before rows or all three in one matrix; copied only where columns lie apart."""
    q, key, value = (x.detach() for x in leaves(21, 4, 2, 16))
    heads_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, key, value)]
    side_by_side = torch.cat([q, key, value], 1).split([4, 2, 2], 1)
    columns_apart = [x.repeat_interleave(2, 2)[:, :, ::2] for x in (q, key, value)]
    expected = run([x.requires_grad_() for x in (q, key, value)], [9, 10])
    for views in (heads_first, side_by_side, columns_apart):
        assert not any(x.is_contiguous() for x in views)
        assert_equal_bits(run([x.requires_grad_() for x in views], [9, 10]), expected)
    for views, copied in ((heads_first, False), (side_by_side, False), (columns_apart, True)):
        with recording() as launches, torch.no_grad():
            varlen_attention(*views, bounds([9, 10], device=q.device), 10)
        given_ = [launches[0].arguments[name].data_ptr() for name in ("q_ptr", "key_ptr", "value_ptr")]
        assert [a != x.data_ptr() for a, x in zip(given_, views, strict=True)] == [copied] * 3


def test_rows_may_lie_beyond_two_to_the_31(triton, tmp_path):
    """A sparse file of 4.3 GB of which a few pages are touched; on a GPU, the memory itself."""
    rows, width, apart = 515, 16, 2**22
    assert (rows - 1) * apart > 2**31
    device = device_for_triton()
    if device.type == "cpu":
        matrix = torch.from_file(str(tmp_path / "rows"), shared=True, size=rows * apart, dtype=torch.float16)
    else:
        matrix = torch.zeros(rows * apart, dtype=torch.float16, device=device)
    dense = [x.half() for x in inputs(rows, 1, 1, width, device=device)]
    far = [matrix.as_strided((rows, 1, width), (apart, apart, 1), i * width) for i in range(3)]
    for view, x in zip(far, dense, strict=True):
        view.copy_(x)
    got, expected = (run([x.requires_grad_() for x in tensors], [500, 13]) for tensors in (far, dense))
    assert_equal_bits(got, expected)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_stays_in_its_sample(backend, monkeypatch):
    monkeypatch.setenv("FVLM_KERNELS", backend)
    q, key, value = (x.float() for x in inputs(12, device=device_for_triton() if backend == "triton" else "cpu"))
    clean = run([x.requires_grad_() for x in (q, key, value)], [4, 3, 4])
    for x in (q, key, value):
        x.detach()[5] = math.nan
    dirty = run([x.requires_grad_() for x in (q, key, value)], [4, 3, 4])
    for a, b in zip(dirty, clean, strict=True):
        assert torch.equal(a[:4], b[:4])
        assert torch.equal(a[7:], b[7:])
        assert a[5].isnan().all()
    assert dirty[0][5:7].isnan().all()


def test_gradients_are_right_to_second_order():
    q, key, value = (x.requires_grad_() for x in inputs(6, heads=2, kv_heads=1, width=4))
    assert torch.autograd.gradcheck(lambda *x: varlen_attention(*x, bounds([2, 3]), 3), (q, key, value))


def test_wrong_arguments_are_named(monkeypatch):
    q, key, value = inputs(6)
    with pytest.raises(ValueError, match="key must be"):
        varlen_attention(q, key[:, :1].expand(-1, 3, -1), value, bounds([6]), 6)
    with pytest.raises(ValueError, match="key must be"):
        varlen_attention(q, key[:, :0], value[:, :0], bounds([6]), 6)
    with pytest.raises(ValueError, match="value must be"):
        varlen_attention(q, key, value[1:], bounds([6]), 6)
    with pytest.raises(ValueError, match="float64 as q"):
        varlen_attention(q, key.float(), value.float(), bounds([6]), 6)
    with pytest.raises(ValueError, match="on cpu as q"):
        varlen_attention(q, key.to("meta"), value, bounds([6]), 6)
    with pytest.raises(ValueError, match="int32"):
        varlen_attention(q, key, value, bounds([6]).long(), 6)
    monkeypatch.setenv("FVLM_DEBUG", "1")
    for wrong in ([1, 6], [0, 4, 2], [0, 9]):
        with pytest.raises(ValueError, match="cu_seqlens"):
            varlen_attention(q, key, value, torch.tensor(wrong, dtype=torch.int32), 9)
    with pytest.raises(ValueError, match="max_seqlen"):
        varlen_attention(q, key, value, bounds([6]), 5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cu_seqlens", [[0], [0, 0, 0]], ids=str)
def test_a_pack_without_samples_keeps_its_place_in_the_graph(backend, cu_seqlens, monkeypatch):
    """Ranks fill gradient buckets in the order of arrival, so an empty pack must give zero gradients, not none."""
    monkeypatch.setenv("FVLM_KERNELS", backend)
    device = device_for_triton() if backend == "triton" else "cpu"
    tensors = [x.float().requires_grad_() for x in inputs(3, device=device)]
    out = varlen_attention(*tensors, torch.tensor(cu_seqlens, dtype=torch.int32, device=device), 4)
    assert out.abs().sum() == 0
    out.sum().backward()
    assert all(x.grad is not None and x.grad.abs().sum() == 0 for x in tensors)
