"""Packed causal attention inside its surroundings: FlashAttention, compilation, checkpointing, autocast, Llama."""

from __future__ import annotations

import math
import sys
from functools import partial
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from fvlm.kernels.varlen_attention import flash, varlen_attention
from fvlm.kernels.varlen_attention.reference import varlen_attention_reference
from fvlm.model.base import ATTENTION
from tests.kernels.checks import assert_close, backward_tolerance, device_for_triton, forward_tolerance, in_dtype
from tests.kernels.test_varlen_attention import assert_equal_bits, bounds, inputs, leaves, run

LENGTHS, TAIL = [4, 0, 9, 1], 3
FAKED = ["flash_attn", "torch", "torch 2.11"]


class TailLeftAlone(torch.autograd.Function):
    """The reference, but as FlashAttention has it: nobody writes the tail's outputs and gradients."""

    @staticmethod
    def forward(ctx, q, key, value, cu_seqlens):
        ctx.save_for_backward(q, key, value, cu_seqlens)
        return TailLeftAlone.spoil(varlen_attention_reference(q, key, value, cu_seqlens, 0), cu_seqlens)

    @staticmethod
    def backward(ctx, d_out):
        *tensors, cu_seqlens = ctx.saved_tensors
        with torch.enable_grad():
            tensors = [x.detach().requires_grad_() for x in tensors]
            out = varlen_attention_reference(*tensors, cu_seqlens, 0)
        return *(TailLeftAlone.spoil(x, cu_seqlens) for x in torch.autograd.grad(out, tensors, d_out)), None

    @staticmethod
    def spoil(x, cu_seqlens):
        x = x.clone()
        x[cu_seqlens[-1] :] = math.nan
        return x


def fake_flash_attn(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *, causal, deterministic):
    assert causal
    assert deterministic
    return fake(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)


def fake_varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size, enable_gqa=False):
    assert enable_gqa == (query.shape[1] != key.shape[1])
    return fake_varlen_attn_211(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size=window_size)


def fake_varlen_attn_211(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size):
    assert window_size == (-1, 0)  # a tuple: torch compares it with one to see that attention is causal
    return fake(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)


def fake(q, key, value, bounds_q, bounds_k, longest_q, longest_k):
    assert torch.equal(bounds_q, bounds_k)
    assert longest_q == longest_k >= int(bounds_q.diff().max())
    return TailLeftAlone.apply(q, key, value, bounds_q)


@pytest.fixture(params=FAKED)
def faked(request, monkeypatch):
    """FlashAttention by the package or by torch, with a reference in its place that runs here."""
    monkeypatch.setenv("FVLM_KERNELS", request.param.split()[0])
    monkeypatch.setattr(flash, "_refuses_flash", lambda probe: None)
    package = ModuleType("flash_attn")
    package.__spec__ = ModuleSpec("flash_attn", None)
    package.flash_attn_varlen_func = fake_flash_attn
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    with_groups = request.param != "torch 2.11"
    monkeypatch.setattr(flash, "_TAKES_GROUPS", with_groups)
    monkeypatch.setattr(flash.varlen, "varlen_attn", fake_varlen_attn if with_groups else fake_varlen_attn_211)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_flash_attention_is_called_as_it_wants_and_its_tail_is_zero(kv_heads, faked, monkeypatch):
    tensors = [x.requires_grad_() for x in inputs(sum(LENGTHS) + TAIL, 4, kv_heads)]
    for x in tensors:
        x.detach()[sum(LENGTHS) :] = math.nan
    got = run(tensors, LENGTHS, unused=2)
    monkeypatch.setenv("FVLM_KERNELS", "reference")
    torch.testing.assert_close(got, run(tensors, LENGTHS, unused=2), rtol=0, atol=1e-12)
    assert all(x[sum(LENGTHS) :].abs().sum() == 0 for x in got)


def test_flash_attention_without_samples_gives_zero_gradients(faked):
    out, *gradients = run([x.requires_grad_() for x in inputs(3)], [], unused=2)
    assert out.abs().sum() == 0
    assert all(x.abs().sum() == 0 for x in gradients)


def test_torch_pads_where_its_flash_attention_takes_no_such_heads(faked, monkeypatch):
    monkeypatch.setenv("FVLM_KERNELS", "torch")
    monkeypatch.delattr(flash.varlen, "varlen_attn")
    tensors = [x.requires_grad_() for x in inputs(sum(LENGTHS), width=12)]
    got = run(tensors, LENGTHS)
    monkeypatch.setenv("FVLM_KERNELS", "reference")
    torch.testing.assert_close(got, run(tensors, LENGTHS), rtol=0, atol=1e-12)


def test_flash_attn_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setenv("FVLM_KERNELS", "flash_attn")
    with pytest.raises(RuntimeError, match="flash_attn: FlashAttention needs a GPU"):
        varlen_attention(*inputs(6), bounds([6]), 6)
    monkeypatch.setattr(flash, "_refuses_flash", lambda probe: None)
    monkeypatch.setattr(flash.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="flash_attn is not installed"):
        varlen_attention(*inputs(6), bounds([6]), 6)


@pytest.mark.parametrize(
    ("dtype", "width", "major", "reason"),
    [
        (torch.float32, 64, 9, "takes bfloat16 and float16, not float32"),
        (torch.float16, 264, 9, "up to 256, not 264"),
        (torch.float16, 64, 7, "compute capability 8.0"),
        (torch.bfloat16, 64, 8, None),
    ],
)
def test_what_flash_attention_takes(dtype, width, major, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major))
    found = flash._refuses_flash(SimpleNamespace(device=torch.device("cuda"), dtype=dtype, shape=(5, 2, width)))
    assert found is None if reason is None else reason in found


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["flash_attn", "torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(9, 3, 64), (4, 4, 64), (2, 1, 128), (4, 2, 16)])
def test_back_ends_of_a_gpu(backend, dtype, heads, kv_heads, width, monkeypatch):
    """The real ones, with samples of many tiles of the sizes that serve there."""
    if backend == "flash_attn":
        pytest.importorskip("flash_attn")
    lengths, tail = [1, 700, 0, 64, 333, 129], 77
    exact, given = in_dtype(inputs(sum(lengths) + tail, heads, kv_heads, width, device="cuda"), dtype)
    monkeypatch.setenv("FVLM_KERNELS", "reference")
    expected = run(exact, lengths, unused=3)
    monkeypatch.setenv("FVLM_KERNELS", backend)
    got = run(given, lengths, unused=3)
    assert_close("out", got[:1], expected[:1], forward_tolerance(dtype))
    assert_close("q key value", got[1:], expected[1:], backward_tolerance(dtype))
    assert all(x[sum(lengths) :].abs().sum() == 0 for x in got)


@pytest.mark.gpu
def test_triton_in_a_cuda_graph(monkeypatch):
    """Captured with one pack's bounds and replayed with another's: no length is read on the host."""
    monkeypatch.setenv("FVLM_KERNELS", "triton")
    tensors = leaves(300, 6, 2, 64, dtype=torch.bfloat16)
    cu_seqlens = bounds([100, 150], 3, "cuda")

    def both_passes():
        out = varlen_attention(*tensors, cu_seqlens, 300)
        return [out, *torch.autograd.grad(out, tensors, torch.ones_like(out))]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        both_passes()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both_passes()
    cu_seqlens.copy_(bounds([3, 200, 70], 2, "cuda"))
    graph.replay()
    assert_equal_bits(captured, both_passes())


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("triton", torch.float32),
        ("torch", torch.float32),
        ("auto", torch.float32),
        pytest.param("torch", torch.float16, marks=pytest.mark.gpu),
    ],
)
def test_compiles_into_one_graph(backend, dtype, monkeypatch):
    monkeypatch.setenv("FVLM_KERNELS", backend)
    torch.compiler.reset()
    tensors = leaves(17, 4, 2, 16, dtype=dtype)
    compiled = torch.compile(varlen_attention, fullgraph=True)
    for lengths in ([4, 0, 9, 1], [0, 7, 3, 5]):  # other lengths, the same graph
        expected = run(tensors, lengths)
        got = run(tensors, lengths, attend=lambda q, key, value, ends, _: compiled(q, key, value, ends, 16))
        assert_close("out q key value", got, expected, backward_tolerance(dtype))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_activation_checkpointing_changes_nothing(backend, monkeypatch):
    monkeypatch.setenv("FVLM_KERNELS", backend)
    tensors = leaves(sum(LENGTHS) + TAIL)
    again = partial(checkpoint, varlen_attention, use_reentrant=False)
    assert_equal_bits(run(tensors, LENGTHS, attend=again), run(tensors, LENGTHS))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_autocast_sets_the_precision(backend, monkeypatch):
    monkeypatch.setenv("FVLM_KERNELS", backend)
    q, key, value = leaves(sum(LENGTHS) + TAIL)
    with torch.autocast(q.device.type, torch.bfloat16):
        got = run([q, key, value], LENGTHS)
        mixed = varlen_attention(q, key.bfloat16(), value, bounds(LENGTHS, device=q.device), 9)
    half = [x.detach().bfloat16().requires_grad_() for x in (q, key, value)]
    expected = run(half, LENGTHS)
    assert got[0].dtype == torch.bfloat16
    assert [x.dtype for x in got[1:]] == [torch.float32] * 3
    assert_equal_bits([mixed, *(x.bfloat16() for x in got)], [expected[0], *expected])


def test_the_operator_keeps_torch_s_rules():
    """Schema, shapes without data, and registration of the gradient, checked by torch's own tool."""
    pytest.importorskip("triton")
    tensors = leaves(11, 4, 2, 16)
    arguments = (*tensors, bounds([4, 6], device=tensors[0].device))
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.fvlm.varlen_attention, arguments, test_utils=checks)


def test_llama_says_the_same_with_either_back_end(monkeypatch):
    """A packed row of two samples and a tail, through rotary embeddings and grouped heads."""
    device = device_for_triton()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation=ATTENTION,
    )
    llama = LlamaForCausalLM(config).to(device).eval()
    tokens = torch.randint(31, (1, 20), device=device)
    positions = torch.tensor([[*range(11), *range(7), 0, 0]], device=device)

    def logits(backend):
        monkeypatch.setenv("FVLM_KERNELS", f"varlen_attention:{backend}")
        ends = bounds([11, 7], unused=2, device=device)
        with torch.no_grad():
            return llama(tokens, position_ids=positions, use_cache=False, cu_seqlens=ends, max_seqlen=16).logits

    torch.testing.assert_close(logits("triton"), logits("torch"), rtol=1e-4, atol=1e-5)
    alone = llama(tokens[:, 11:18], use_cache=False, cu_seqlens=bounds([7], device=device), max_seqlen=7).logits
    torch.testing.assert_close(logits("triton")[:, 11:18], alone, rtol=1e-4, atol=1e-5)
