"""What head and cross-entropy in Triton cost: the memory beside results, and nothing for rows without a label.

Sizes are SmolLM2's; tensors on the meta device have no memory, and no value that a host function could read.
"""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from fvlm.kernels.launching import interpreted, launch, recording
from fvlm.kernels.linear_cross_entropy import linear_cross_entropy
from tests.kernels.test_linear_cross_entropy import small_tiles

kernel = pytest.importorskip("fvlm.kernels.linear_cross_entropy.kernel")
kernel_backward = pytest.importorskip("fvlm.kernels.linear_cross_entropy.kernel_backward")

ROWS, VOCABULARY = 16384, 49152
FLOAT32_LOGITS = ROWS * VOCABULARY * 4


class LiveMemory(TorchDispatchMode):
    """After every operation of torch: which storages that it or an earlier one allocated are alive, and their bytes."""

    def __init__(self):
        super().__init__()
        self.seen: dict[StorageWeakRef, int] = {}
        self.moments: list[dict[StorageWeakRef, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            storage = x.untyped_storage()
            self.seen.setdefault(StorageWeakRef(storage), storage.nbytes())
        self.moments.append({ref: size for ref, size in self.seen.items() if not ref.expired()})
        return out

    def peak(self, *results):
        """The most at any moment, beside these results."""
        exempt = {StorageWeakRef(x.untyped_storage()) for x in results}
        return max(sum(size for ref, size in moment.items() if ref not in exempt) for moment in self.moments)


def meta_inputs(width, dtype=torch.bfloat16, rows=ROWS):
    hidden, weight = (torch.empty(size, width, dtype=dtype, device="meta") for size in (rows, VOCABULARY))
    return hidden, weight, torch.empty(rows, dtype=torch.int64, device="meta")


@pytest.mark.parametrize(
    ("width", "at_once", "backward_share"), [(576, 3584, 0.04818), (960, 2816, 0.04818), (2048, 768, 0.04948)]
)
def test_memory_beside_results_is_at_most_a_twentieth_of_float32_logits(width, at_once, backward_share, monkeypatch):
    monkeypatch.setattr(kernel, "launch", lambda *_, **__: None)  # a recorded launch would keep its arguments
    inputs = meta_inputs(width)
    assert kernel.entries_at_once(ROWS, VOCABULARY, width, 2) == at_once
    with LiveMemory() as forward:
        logprobs, *saved = kernel.forward(*inputs)
    # a maximum and a sum a row and vocabulary tile of 256: 2/256, 0.78 %; and a few numbers a row
    assert forward.peak(logprobs) / FLOAT32_LOGITS == pytest.approx(2 / 256, abs=0.0002)
    with LiveMemory() as backward:
        gradients = kernel.backward(logprobs, *inputs, *saved, True, True)
    # d_logits of the entries at once in bfloat16, and dH's float32 sums
    assert backward_share == pytest.approx((2 * at_once + 4 * width) / (4 * VOCABULARY), abs=5e-6)
    assert backward.peak(*gradients) == ROWS * (2 * at_once + 4 * width) <= FLOAT32_LOGITS / 20
    # dH itself is made when d_logits are gone
    assert backward.peak(gradients[1]) == ROWS * max(2 * at_once + 4 * width, 4 * width + 2 * width)
    assert [x.shape for x in gradients] == [x.shape for x in inputs[:2]]


def test_a_gradient_that_is_not_wanted_takes_no_memory(monkeypatch):
    monkeypatch.setattr(kernel, "launch", lambda *_, **__: None)
    inputs = meta_inputs(576)
    logprobs, *saved = kernel.forward(*inputs)
    with LiveMemory() as memory:
        d_hidden, d_weight = kernel.backward(logprobs, *inputs, *saved, False, True)
    assert (d_hidden.numel(), d_weight.shape) == (0, inputs[1].shape)
    assert memory.peak(d_weight) == ROWS * 3584 * 2


@given(
    rows=st.integers(0, 200_000), vocabulary=st.integers(1, 300_000), width=st.integers(1, 9000),
    itemsize=st.sampled_from([2, 4]),
)  # fmt: skip
def test_chunks_of_the_vocabulary_are_aligned_and_bounded(rows, vocabulary, width, itemsize):
    at_once = kernel.entries_at_once(rows, vocabulary, width, itemsize)
    assert at_once % 256 == 0
    assert 256 <= at_once < vocabulary + 256
    room = max(rows * vocabulary * 4 / 20, 64 * 2**20)
    assert at_once <= 512 or rows * (at_once * itemsize + width * 4) <= room


@pytest.mark.parametrize(("hidden_grad", "weight_grad"), [(True, True), (True, False), (False, True)])
def test_chunks_cover_the_vocabulary_and_only_what_is_wanted_is_started(hidden_grad, weight_grad):
    inputs = meta_inputs(576)
    with recording() as recorded:
        logprobs, *saved = kernel.forward(*inputs)
        kernel.backward(logprobs, *inputs, *saved, hidden_grad, weight_grad)
    started = {}
    for each in recorded:
        started.setdefault(each.kernel.__name__, []).append(each)
    gradients = started["linear_cross_entropy_bwd_kernel"]
    assert sum(each.arguments["count"] for each in gradients) == VOCABULARY
    assert ("linear_cross_entropy_scatter_kernel" in started) == hidden_grad
    assert {each.arguments["WEIGHT_GRAD"] for each in gradients} == {weight_grad}


class Accesses:
    """The interpreter's loads and stores: each inside what it may touch, each address stored once in a launch."""

    def __init__(self, builder, num_rows):
        self.builder, self.num_rows = builder, num_rows
        self.allowed = np.empty((0, 2), dtype=np.uint64)
        self.stored: list[np.ndarray] = []
        self.launches = 0

    def launch(self, kernel_, num_programs, tiles, **arguments):
        """In place of ``launching.launch``."""
        labelled = arguments["order_ptr"][: self.num_rows]
        ranges = []
        for name, x in arguments.items():
            if not isinstance(x, torch.Tensor):
                continue
            if name == "hidden_ptr":
                x_rows = labelled.tolist()
            elif name in ("d_logits_ptr", "sums_ptr", "logit_ptr"):
                x_rows = range(self.num_rows)
            else:
                x_rows = range(len(x))
            ranges += [(x[row].data_ptr(), x[row].data_ptr() + x[row].numel() * x.element_size()) for row in x_rows]
        self.allowed = np.array(sorted(ranges), dtype=np.uint64).reshape(-1, 2)
        self.stored = []
        launch(kernel_, num_programs, tiles, **arguments)
        stored = np.concatenate(self.stored) if self.stored else np.empty(0)
        assert len(np.unique(stored)) == len(stored), f"{kernel_.__name__} stored something twice"
        self.launches += 1

    def load(self, builder, pointers, mask, *rest):
        """In place of the interpreter's masked load, to which its others lead."""
        self.check(pointers, mask)
        return self.builder["create_masked_load"](builder, pointers, mask, *rest)

    def store(self, builder, pointers, value, mask, *rest):
        """In place of the interpreter's masked store."""
        self.stored.append(self.check(pointers, mask))
        return self.builder["create_masked_store"](builder, pointers, value, mask, *rest)

    def check(self, pointers, mask):
        size = pointers.get_element_ty().primitive_bitwidth // 8
        addresses = np.atleast_1d(pointers.data)[np.atleast_1d(mask.data)].astype(np.uint64)
        if len(addresses):
            index = np.searchsorted(self.allowed[:, 0], addresses, side="right")
            assert (index > 0).all(), "an address before every tensor"
            assert (addresses + np.uint64(size) <= self.allowed[index - 1, 1]).all(), "an address outside its tensor"
        return addresses


@pytest.mark.skipif(not interpreted(), reason="watches the interpreter's memory")
@pytest.mark.parametrize("small", [True, False], ids=["small tiles", "default tiles"])
@pytest.mark.parametrize("num_labels", [0, 1, 17, 60])
def test_only_labelled_rows_are_read_and_everything_is_stored_once(num_labels, small, triton, monkeypatch):
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    hidden, weight, labels = some_labelled(num_labels)
    accesses = Accesses(
        {name: getattr(Builder, name) for name in ("create_masked_load", "create_masked_store")}, num_labels
    )
    monkeypatch.setattr(Builder, "create_masked_load", lambda *args: accesses.load(*args))
    monkeypatch.setattr(Builder, "create_masked_store", lambda *args: accesses.store(*args))
    monkeypatch.setattr(kernel, "launch", accesses.launch)
    monkeypatch.setattr(kernel, "entries_at_once", lambda *_: 64)
    with small_tiles() if small else nullcontext():
        linear_cross_entropy(hidden, weight, labels).loss_sum.backward()
    assert accesses.launches == 2 + 2 * 2 + 1  # two chunks of 100 entries


@pytest.mark.skipif(not interpreted(), reason="counts the interpreter's calls")
@pytest.mark.parametrize("num_labels", [0, 1, 16, 17, 60])
def test_rows_without_label_take_part_in_no_product(num_labels, triton, monkeypatch):
    """160 rows of one geometry: the number of products depends on the labelled ones alone."""
    products = []
    for module, name in ((kernel, "logits"), (kernel_backward, "logits"), (kernel_backward, "dot")):
        function = getattr(module, name)

        def counted(*args, function=function, name=name):
            products.append(name)
            return function(*args)

        monkeypatch.setattr(module, name, counted)
    hidden, weight, labels = some_labelled(num_labels)
    blocks = {name: candidates[4][0].blocks for name, candidates in kernel.CANDIDATES.items()}
    assert blocks["linear_cross_entropy_fwd"] == {"BLOCK_M": 64, "BLOCK_V": 64, "BLOCK_D": 32}
    assert blocks["linear_cross_entropy_bwd"] == {"BLOCK_A": 64, "BLOCK_D": 64, "BLOCK_I": 32}
    linear_cross_entropy(hidden, weight, labels).loss_sum.backward()
    row_tiles = -(-num_labels // 64)
    assert products.count("logits") == 2 * 2 * row_tiles  # forward and again backward, two vocabulary tiles
    # dW: two tiles of the vocabulary, labelled rows in steps of 32; dH: the labelled rows' tiles, 100 entries so
    assert products.count("dot") == 2 * -(-num_labels // 32) + row_tiles * 4


def some_labelled(num_labels):
    """160 rows of which so many, anywhere, have labels; 100 entries, width 32."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 32, generator=generator).requires_grad_() for n in (160, 100))
    labels = torch.full((160,), -100)
    chosen = torch.randperm(160, generator=generator)[:num_labels]
    labels[chosen] = torch.randint(100, (num_labels,), generator=generator)
    return hidden, weight, labels
