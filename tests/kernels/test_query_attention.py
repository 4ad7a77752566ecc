"""Query attention against a loop over queries in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from fvlm.kernels.launching import recording
from fvlm.kernels.query_attention import frame_offsets, query_attention
from fvlm.kernels.query_attention.reference import attention_weights, query_attention_reference
from tests.kernels.checks import (
    assert_close,
    backward_tolerance,
    device_for_triton,
    forward_tolerance,
    in_dtype,
    where_it_runs,
)

BACKENDS = ["triton", "torch", "reference"]
HALF_AND_FULL = [torch.float32, torch.bfloat16, torch.float16]
RESULTS, GRADIENTS = "out logsumexp entropy", "q key value"


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
    if not outs:
        return q * 0, q.sum(-1) * 0, q.sum(-1) * 0
    shape = q.shape[:2]
    return torch.stack(outs).view(q.shape), torch.stack(lses).view(shape), torch.stack(entropies).view(shape)


def inputs(num_queries, num_frames, num_keys, heads=2, width=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(num_queries, heads, width, generator=generator, dtype=torch.float64)
    key, value = torch.randn(2, num_frames, num_keys, heads, width, generator=generator, dtype=torch.float64)
    frame = torch.randint(num_frames, (num_queries,), generator=generator).sort().values
    return q, key, value, frame


def check_against(expected_of, tensors, frame, dtype, upstream_of=(0,)):
    """Results and gradients of the back end in force, with upstream gradients for the results at these positions."""
    exact, given_ = in_dtype(tensors, dtype)
    expected, got = expected_of(*exact, frame), query_attention(*given_, where_it_runs(frame))
    assert_close(RESULTS, got, expected, forward_tolerance(dtype))
    drawn = torch.Generator().manual_seed(1)
    upstream = [torch.randn(expected[i].shape, generator=drawn).to(dtype).double() for i in upstream_of]
    torch.autograd.backward([expected[i] for i in upstream_of], upstream)
    torch.autograd.backward(
        [got[i] for i in upstream_of], [g.to(got[i]) for i, g in zip(upstream_of, upstream, strict=True)]
    )
    gradients = [[torch.zeros_like(x) if x.grad is None else x.grad for x in leaves] for leaves in (given_, exact)]
    assert_close(GRADIENTS, *gradients, backward_tolerance(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, *HALF_AND_FULL], ids=str)
@pytest.mark.parametrize(
    ("queries", "frames", "keys"), [(1, 1, 1), (5, 3, 17), (9, 2, 257), (3, 7, 5), (40, 1, 33), (64, 3, 70)]
)
def test_equals_brute_force_forward_and_backward(backend, dtype, queries, frames, keys, monkeypatch):
    monkeypatch.setenv("FVLM_KERNELS", backend)
    if backend == "triton" and dtype == torch.float64:
        with pytest.raises(RuntimeError, match="not float64"):
            query_attention(*inputs(queries, frames, keys))
        return
    *tensors, frame = inputs(queries, frames, keys)
    check_against(brute_force, tensors, frame, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_flow_from_logsumexp_and_entropy_too(backend, monkeypatch):
    monkeypatch.setenv("FVLM_KERNELS", backend)
    *tensors, frame = inputs(20, 2, 19)
    check_against(brute_force, tensors, frame, torch.float32, upstream_of=(0, 1, 2))
    check_against(brute_force, tensors, frame, torch.float32, upstream_of=(1,))
    check_against(brute_force, tensors, frame, torch.float32, upstream_of=(2,))


@settings(max_examples=12, deadline=None)
@given(
    counts=st.lists(st.integers(0, 19), min_size=1, max_size=5),
    num_keys=st.integers(1, 70),
    heads=st.integers(1, 3),
    width=st.sampled_from([8, 16, 24, 32, 64, 80, 128]),
    dtype=st.sampled_from(HALF_AND_FULL),
)
def test_triton_on_any_shape(counts, num_keys, heads, width, dtype):
    """Frames without queries, with one, with more than a block; head widths that are no power of two."""
    q, key, value, _ = inputs(sum(counts), len(counts), num_keys, heads, width)
    frame = torch.tensor([f for f, n in enumerate(counts) for _ in range(n)], dtype=torch.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FVLM_KERNELS", "triton")
        check_against(query_attention_reference, (q, key, value), frame, dtype)


def on_device(dtype=torch.float32, **shape):
    *tensors, frame = inputs(**{"num_queries": 11, "num_frames": 3, "num_keys": 40, **shape})
    device = device_for_triton()
    return [x.to(device, dtype).requires_grad_() for x in tensors], frame.to(device)


def run(tensors, frame, attend=query_attention):
    out = attend(*tensors, frame)
    gradients = torch.autograd.grad(sum((x.float() ** 2).sum() for x in out), tensors)
    return [*out, *gradients]


def test_two_runs_give_the_same_bits(triton):
    tensors, frame = on_device(torch.bfloat16, num_queries=150)
    for a, b in zip(run(tensors, frame), run(tensors, frame), strict=True):
        assert torch.equal(a, b)


def test_frames_rows_and_heads_may_lie_apart_in_memory(triton):
    """The encoder hands in K and V cut from rows that hold the rider too."""
    tensors, frame = on_device()
    plain = run(tensors, frame)
    q, key, value = (x.detach() for x in tensors)
    wide_key = torch.cat([key, torch.full_like(key[:, :1], math.nan)], 1)
    wide_value = torch.cat([value, value], 3)
    views = [q.transpose(0, 1).contiguous().transpose(0, 1), wide_key[:, :-1], wide_value[..., : value.shape[3]]]
    for a, b in zip(run([x.requires_grad_() for x in views], frame), plain, strict=True):
        assert torch.equal(a, b)


def test_offsets_may_be_handed_in(triton):
    tensors, frame = on_device()
    offsets = frame_offsets(frame, 3)
    assert offsets.tolist() == [int((frame < f).sum()) for f in range(4)]
    spread = torch.stack([offsets, torch.full_like(offsets, -7)], 1)[:, 0]
    for given_ in (offsets, spread):
        for a, b in zip(query_attention(*tensors, frame, given_), query_attention(*tensors, frame), strict=True):
            assert torch.equal(a, b)


def test_a_frozen_encoder_costs_no_gradient_of_its_keys(triton):
    """dq is the same to the bit, and no dK or dV is allocated; also for a frame with more queries than a block."""
    tensors, frame = on_device(num_queries=90)
    d_q = torch.autograd.grad(query_attention(*tensors, frame)[0].sum(), tensors)[0]
    q, key, value = (x.detach() for x in tensors)
    out = query_attention(q.requires_grad_(), key, value, frame)[0]
    with recording() as launches:
        torch.autograd.grad(out.sum(), q, retain_graph=True)
    assert [launches[0].arguments[name].numel() for name in ("d_key_ptr", "d_value_ptr")] == [0, 0]
    assert torch.equal(torch.autograd.grad(out.sum(), q)[0], d_q)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_frame_that_nobody_looks_at_gets_zero_gradient(backend, monkeypatch):
    monkeypatch.setenv("FVLM_KERNELS", backend)
    q, key, value, _ = (where_it_runs(x.float()) for x in inputs(3, 4, 6))
    key.requires_grad_()
    value[1] = math.nan  # nor is it read
    frame = where_it_runs(torch.tensor([0, 2, 2]))
    query_attention(q, key, value, frame)[0].sum().backward()
    assert key.grad[1].abs().max() == 0
    assert key.grad[3].abs().max() == 0
    assert key.grad[2].abs().max() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_stays_in_its_frame(backend, monkeypatch):
    monkeypatch.setenv("FVLM_KERNELS", backend)
    tensors, frame = on_device()
    clean = run(tensors, frame)
    with torch.no_grad():
        tensors[1][1, 7] = math.nan
    for index, (got, expected) in enumerate(zip(run(tensors, frame), clean, strict=True)):
        others = torch.tensor([0, 2], device=got.device) if index > 3 else (frame != 1).nonzero().squeeze(1)
        assert torch.equal(got[others], expected[others])
        assert got.isnan().any()


def test_torch_compile_sees_no_graph_break(monkeypatch):
    torch.compiler.reset()
    for backend in ("triton", "auto"):
        monkeypatch.setenv("FVLM_KERNELS", backend)
        tensors, frame = on_device()
        eager = run(tensors, frame)
        compiled = run(tensors, frame, torch.compile(query_attention, fullgraph=True, backend="aot_eager"))
        assert_close(f"{RESULTS} {GRADIENTS}", compiled, eager, 1e-6)
        torch.compiler.reset()


def test_heads_beyond_the_tiles_are_refused(triton):
    tensors, frame = on_device(width=136)
    with pytest.raises(RuntimeError, match="up to 128, not 136"):
        query_attention(*tensors, frame)


def test_the_op_is_registered_as_torch_expects(triton):
    (q, key, value), frame = on_device()
    torch.library.opcheck(torch.ops.fvlm.query_attention.default, (q, key, value, frame_offsets(frame, 3)))


def test_recomputation_changes_no_bit(triton):
    tensors, frame = on_device()

    def recomputed(*args):
        return checkpoint(query_attention, *args, use_reentrant=False)

    for a, b in zip(run(tensors, frame, recomputed), run(tensors, frame), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_decides_the_precision(backend, monkeypatch):
    monkeypatch.setenv("FVLM_KERNELS", backend)
    tensors, frame = on_device()
    with torch.autocast(tensors[0].device.type, torch.bfloat16):
        out, lse, _ = query_attention(tensors[0].bfloat16(), *tensors[1:], frame)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    expected = query_attention(*(x.bfloat16() for x in tensors), frame)[0]
    assert torch.equal(out, expected)


def test_heat_maps_are_the_weights_behind_the_output():
    q, key, value, frame = inputs(4, 2, 9)
    weights = attention_weights(q, key, frame)
    out = torch.einsum("vhn,vnhk->vhk", weights.double(), value[frame])
    torch.testing.assert_close(out, query_attention(q, key, value, frame)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_entropy_of_a_sharp_attention_is_finite_and_zero(backend, monkeypatch):
    monkeypatch.setenv("FVLM_KERNELS", backend)
    q, key, value, frame = (where_it_runs(x.float() if x.is_floating_point() else x) for x in inputs(2, 1, 8))
    _, _, entropy = query_attention(q * 1e4, key, value, frame)
    assert entropy.abs().max() < 1e-6


def test_wrong_arguments_are_named(monkeypatch):
    q, key, value, frame = inputs(4, 2, 9)
    with pytest.raises(ValueError, match="value"):
        query_attention(q, key, value[:, 1:], frame)
    with pytest.raises(ValueError, match="visual_frame"):
        query_attention(q, key, value, frame.int())
    with pytest.raises(ValueError, match="float64 as q"):
        query_attention(q, key.float(), value.float(), frame)
    with pytest.raises(ValueError, match="key must be on cpu"):
        query_attention(q, key.to("meta"), value, frame)
    with pytest.raises(ValueError, match="offsets"):
        query_attention(q, key, value, frame, frame_offsets(frame, 3))
    monkeypatch.setenv("FVLM_DEBUG", "1")
    with pytest.raises(ValueError, match="offsets"):
        query_attention(q, key, value, frame, torch.zeros(3, dtype=torch.int32))
    with pytest.raises(ValueError, match="sorted"):
        query_attention(q, key, value, torch.tensor([1, 0, 1, 1]))
    with pytest.raises(ValueError, match=r"\[0, 2\)"):
        query_attention(q, key, value, torch.tensor([0, 0, 1, 2]))


@pytest.mark.slow
def test_addresses_beyond_31_bits(triton):
    """Frame strides of 2³⁰ elements: the third frame lies beyond what int32 can address."""
    stride, keys, heads, width = 2**30, 3, 1, 16
    storage = torch.empty(2 * stride + keys * width, dtype=torch.float16, device=device_for_triton())
    key = storage.as_strided((3, keys, heads, width), (stride, width, width, 1))
    values = torch.randn(key.shape)
    key.copy_(values)
    q = torch.randn(3, heads, width).to(key)
    frame = torch.arange(3, device=key.device)
    got = query_attention(q, key, key, frame)[0]
    expected = brute_force(q.double(), key.double(), key.double(), frame)[0]
    assert_close("out", [got], [expected], forward_tolerance(torch.float16))
