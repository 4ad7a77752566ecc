"""Head and cross-entropy against plain float64 sums."""

from __future__ import annotations

import math
from contextlib import ExitStack

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from fvlm.kernels.launching import Tiles, forced
from fvlm.kernels.linear_cross_entropy import linear_cross_entropy
from fvlm.kernels.linear_cross_entropy import reference as implementation
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
SMALL_LOGIT_TILES = Tiles({"BLOCK_M": 16, "BLOCK_V": 32, "BLOCK_D": 16}, 4, 2)
SMALL_TILES = {
    "linear_cross_entropy_fwd": SMALL_LOGIT_TILES,
    "linear_cross_entropy_logits_bwd": SMALL_LOGIT_TILES,
    "linear_cross_entropy_bwd": Tiles({"BLOCK_A": 32, "BLOCK_D": 16, "BLOCK_I": 16}, 4, 2),
}


def small_tiles():
    """Tiles of 16 and 32 everywhere, as a context."""
    stack = ExitStack()
    for kernel, tiles in SMALL_TILES.items():
        stack.enter_context(forced(kernel, tiles))
    return stack


def brute_force(hidden, weight, labels):
    """Log-probabilities row by row."""
    rows = []
    for h, label in zip(hidden, labels.tolist(), strict=True):
        scores = weight @ h
        rows.append(scores[label] - scores.exp().sum().log() if label != -100 else scores.sum() * 0)
    return torch.stack(rows) if rows else hidden.sum(-1) * weight.sum()


def inputs(rows=11, width=8, vocabulary=23):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64)
    labels = torch.randint(vocabulary, (rows,), generator=generator)
    labels[::3] = -100
    return hidden, weight, labels


def check_against_brute_force(hidden, weight, labels, dtype):
    """Results, and gradients where every token has its own factor, as DPO needs."""
    exact, given_ = in_dtype((hidden, weight), dtype)
    expected, got = brute_force(*exact, labels), linear_cross_entropy(*given_, where_it_runs(labels))
    assert got.logprobs.dtype == got.loss_sum.dtype == torch.promote_types(dtype, torch.float32)
    results = (got.logprobs, got.loss_sum, got.num_labels)
    sums = (-expected.sum(), (labels != -100).sum())
    assert_close("logprobs loss_sum num_labels", results, (expected, *sums), forward_tolerance(dtype))
    upstream = torch.randn_like(expected)
    expected.backward(upstream)
    got.logprobs.backward(upstream.to(got.logprobs))
    gradients = ([x.grad for x in leaves] for leaves in (given_, exact))
    assert_close("hidden weight", *gradients, backward_tolerance(dtype))


@pytest.mark.parametrize(("backend", "rows_at_once"), [*((name, 2048) for name in BACKENDS), ("torch", 4)])
@pytest.mark.parametrize("dtype", [torch.float64, *HALF_AND_FULL], ids=str)
@pytest.mark.parametrize(("rows", "width", "vocabulary"), [(11, 8, 23), (1, 16, 1), (150, 72, 300), (0, 8, 5)])
def test_equals_brute_force_forward_and_backward(backend, rows_at_once, dtype, rows, width, vocabulary, monkeypatch):
    monkeypatch.setenv("FVLM_KERNELS", backend)
    monkeypatch.setattr(implementation, "ROWS_AT_ONCE", rows_at_once)
    hidden, weight, labels = inputs(rows, width, vocabulary)
    if rows == 1:
        labels[:] = 0
    if backend == "triton" and dtype == torch.float64:
        with pytest.raises(RuntimeError, match="not float64"):
            linear_cross_entropy(hidden, weight, labels)
        return
    check_against_brute_force(hidden / width**0.5, weight, labels, dtype)


@settings(max_examples=12, deadline=None)
@given(
    labelled=st.lists(st.booleans(), max_size=70),
    width=st.integers(1, 50),
    vocabulary=st.integers(1, 150),
    at_once=st.sampled_from([32, 96, 256]),
    dtype=st.sampled_from(HALF_AND_FULL),
)
def test_triton_on_any_shape(labelled, width, vocabulary, at_once, dtype):
    """Small tiles: several in every direction, with tails, and several chunks of the vocabulary."""
    kernel = pytest.importorskip("fvlm.kernels.linear_cross_entropy.kernel")
    hidden, weight, _ = inputs(len(labelled), width, vocabulary)
    labels = torch.tensor([i * 37 % vocabulary if keep else -100 for i, keep in enumerate(labelled)]).long()
    with pytest.MonkeyPatch.context() as patch, small_tiles():
        patch.setenv("FVLM_KERNELS", "triton")
        patch.setattr(kernel, "entries_at_once", lambda *_: at_once)
        check_against_brute_force(hidden / width**0.5, weight, labels, dtype)


@pytest.mark.parametrize(("rows", "vocabulary"), [(400, 40), (20, 2100)])
def test_many_tiles(rows, vocabulary, triton):
    """More row tiles than take turns at a vocabulary tile; more vocabulary tiles than are merged at once."""
    hidden, weight, labels = inputs(rows, 16, vocabulary)
    weight[-32:] *= 3  # the maximum comes last
    with small_tiles():
        check_against_brute_force(hidden, weight, labels, torch.float32)


def on_device(dtype=torch.float32, **shape):
    hidden, weight, labels = (x.to(device_for_triton()) for x in inputs(**shape))
    return [x.to(dtype).requires_grad_() for x in (hidden, weight)], labels


def run(tensors, labels, head=linear_cross_entropy, upstream=None):
    """Log-probabilities, loss and the gradients of ``tensors``; of the sum, where no upstream gradient is given."""
    out = head(*tensors, labels)
    wanted = [x for x in tensors if x.requires_grad]
    loss = out.loss_sum if upstream is None else (out.logprobs * upstream).sum()
    return [out.logprobs, out.loss_sum, *torch.autograd.grad(loss, wanted)]


def assert_equal_bits(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_two_runs_give_the_same_bits(triton):
    tensors, labels = on_device(torch.bfloat16, rows=150, width=40, vocabulary=200)
    assert_equal_bits(run(tensors, labels), run(tensors, labels))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_sum_is_the_tokens_with_factor_minus_one(backend, monkeypatch):
    monkeypatch.setenv("FVLM_KERNELS", backend)
    tensors, labels = on_device()
    assert_equal_bits(run(tensors, labels), run(tensors, labels, upstream=-torch.ones_like(labels).float()))


@pytest.mark.parametrize("wanted", [0, 1])
def test_a_gradient_does_not_depend_on_whether_the_other_is_wanted(wanted, triton):
    tensors, labels = on_device()
    both = run(tensors, labels)
    tensors[1 - wanted].requires_grad_(False)
    assert_equal_bits(run(tensors, labels), [*both[:2], both[2 + wanted]])


@pytest.mark.parametrize("order", [[0, 1], [1, 0]], ids=["first", "last"])
def test_labels_at_the_ends_of_the_vocabulary(order, triton):
    hidden, weight, labels = inputs(vocabulary=130)
    labels[labels != -100] = [0, 129][order[0]]
    labels[-1] = [0, 129][order[1]]
    check_against_brute_force(hidden, weight, labels, torch.float32)


def test_memory_may_lie_in_any_order(triton):
    tensors, labels = on_device()
    hidden, weight = (x.detach().T.contiguous().T.requires_grad_() for x in tensors)
    spread = torch.stack([labels, labels], 1)[:, 0]
    assert_equal_bits(run([hidden, weight], spread), run(tensors, labels))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_label_change_nothing(backend, monkeypatch):
    monkeypatch.setenv("FVLM_KERNELS", backend)
    tensors, labels = on_device()
    clean = run(tensors, labels)
    unlabelled = labels == -100
    with torch.no_grad():
        tensors[0][unlabelled] = math.nan  # nor are they read
    upstream = torch.where(unlabelled, math.nan, -1.0)
    assert_equal_bits(run(tensors, labels), clean)
    logprobs = linear_cross_entropy(*tensors, labels).logprobs
    assert (logprobs[unlabelled] == 0).all()
    assert (clean[2][unlabelled] == 0).all()
    if backend == "triton":
        assert_equal_bits(torch.autograd.grad(logprobs, tensors, upstream), clean[2:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_label_at_all_gives_zero_loss_and_gradient(backend, monkeypatch):
    monkeypatch.setenv("FVLM_KERNELS", backend)
    tensors, labels = on_device()
    out = linear_cross_entropy(*tensors, torch.full_like(labels, -100))
    assert (out.loss_sum, out.num_labels, out.logprobs.abs().max()) == (0, 0, 0)
    for gradient in torch.autograd.grad(out.loss_sum, tensors):
        assert gradient.abs().max() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_stays_in_its_row(backend, monkeypatch):
    monkeypatch.setenv("FVLM_KERNELS", backend)
    tensors, labels = on_device()
    logprobs, _, d_hidden, _ = run(tensors, labels)
    with torch.no_grad():
        tensors[0][4, 3] = math.nan
    got, loss, got_d_hidden, d_weight = run(tensors, labels)
    others = torch.arange(len(labels), device=labels.device) != 4
    assert_equal_bits((got[others], got_d_hidden[others]), (logprobs[others], d_hidden[others]))
    assert got[4].isnan()
    assert loss.isnan()
    assert got_d_hidden[4].isnan().all()
    assert d_weight.isnan().all()  # every entry's gradient holds a share of every row


@pytest.mark.parametrize("foreign", [-1, 23, 130, 2**32 + 5, -(2**40)])
def test_a_label_outside_the_vocabulary_is_impossible_and_reads_nothing(foreign, triton, monkeypatch):
    tensors, labels = on_device()
    clean = run(tensors, labels)
    labels[4] = foreign
    got = run(tensors, labels)
    others = torch.arange(len(labels), device=labels.device) != 4
    assert got[0][4] == -math.inf
    assert_equal_bits((got[0][others], got[2][others]), (clean[0][others], clean[2][others]))
    softmax = (tensors[0].double() @ tensors[1].double().T).softmax(1)[4]
    assert_close("hidden", [got[2][4]], [softmax @ tensors[1].double()], backward_tolerance(torch.float32))
    assert got[3].isfinite().all()
    monkeypatch.setenv("FVLM_DEBUG", "1")
    with pytest.raises(ValueError, match=r"labels must be -100 or in \[0, 23\)"):
        linear_cross_entropy(*tensors, labels)


def test_torch_compile_sees_no_graph_break(monkeypatch):
    torch.compiler.reset()
    monkeypatch.setattr(implementation, "ROWS_AT_ONCE", 4)  # so that torch's chunks are traced too
    for backend in ("triton", "auto"):
        monkeypatch.setenv("FVLM_KERNELS", backend)
        tensors, labels = on_device()
        eager = run(tensors, labels)
        compiled = run(tensors, labels, torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager"))
        assert_close("logprobs loss_sum hidden weight", compiled, eager, 1e-6)
        torch.compiler.reset()


def test_the_op_is_registered_as_torch_expects(triton):
    (hidden, weight), labels = on_device()
    torch.library.opcheck(torch.ops.fvlm.linear_cross_entropy.default, (hidden, weight, labels))


def test_recomputation_changes_no_bit(triton):
    tensors, labels = on_device()

    def recomputed(*args):
        return checkpoint(linear_cross_entropy, *args, use_reentrant=False)

    assert_equal_bits(run(tensors, labels, recomputed), run(tensors, labels))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_decides_the_precision(backend, monkeypatch):
    monkeypatch.setenv("FVLM_KERNELS", backend)
    (hidden, weight), labels = on_device()
    with torch.autocast(hidden.device.type, torch.bfloat16):
        out = linear_cross_entropy(hidden.bfloat16(), weight, labels)
        gradient = torch.autograd.grad(out.loss_sum, weight)[0]
    assert (out.logprobs.dtype, gradient.dtype) == (torch.float32, torch.float32)
    assert_equal_bits(out, linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), labels))


def test_wrong_arguments_are_named(monkeypatch):
    hidden, weight, labels = inputs()
    with pytest.raises(ValueError, match="hidden"):
        linear_cross_entropy(hidden[0], weight, labels)
    for wrong in (weight[:, 1:], weight[:0], weight.float(), weight.to("meta")):
        with pytest.raises(ValueError, match="weight"):
            linear_cross_entropy(hidden, wrong, labels)
    for wrong in (labels[1:], labels.int(), labels.to("meta")):
        with pytest.raises(ValueError, match="labels"):
            linear_cross_entropy(hidden, weight, wrong)
    monkeypatch.setenv("FVLM_DEBUG", "1")
    linear_cross_entropy(hidden, weight, labels)
    with pytest.raises(ValueError, match="labels"):
        linear_cross_entropy(hidden, weight, labels.masked_fill(labels == -100, -1))


@pytest.mark.gpu
def test_a_graph_serves_any_labels(triton):
    """Capture fails on any wait for the device; what was captured must not depend on the labels it saw."""
    tensors, labels = on_device(torch.bfloat16, rows=300, width=64, vocabulary=1000)
    others = labels.roll(1).masked_fill(labels.roll(2) == -100, -100)
    expected = run(tensors, others)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run(tensors, labels)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        got = run(tensors, labels)
    labels.copy_(others)
    graph.replay()
    torch.cuda.synchronize()
    assert_equal_bits(got, expected)
