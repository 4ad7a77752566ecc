"""The whole model through the Triton kernels: the same losses and gradients as through plain torch."""

from __future__ import annotations

import pytest
import torch

from fvlm.model import build_model, tiny_config
from tests.kernels.checks import device_for_triton, worst
from tests.model.samples import mixed, pack

pytest.importorskip("triton")
VOCABULARY = 64


def losses_and_gradients(backend, monkeypatch, dtype=torch.float32, **settings):
    """Loss, log-probabilities, entropy and every gradient of one pass over mixed samples with unused rows."""
    monkeypatch.setenv("FVLM_KERNELS", backend)
    torch.manual_seed(0)
    model = build_model(tiny_config(VOCABULARY)).train()
    if settings.get("recompute"):
        model.gradient_checkpointing_enable()
    _, rows, frames = mixed(4, VOCABULARY)
    device = device_for_triton()
    batch, model = pack(rows, frames, spare=5).to(device), model.to(device)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        out = model(batch=batch, entropy=True, fine_iterations=settings.get("iterations", 1))
    out.loss_sum.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    used = batch.visual_index < len(batch.token_ids)
    return {"loss": out.loss_sum, "logprobs": out.logprobs, "entropy": out.attention_entropy[used]} | gradients


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"iterations": 2}, marks=pytest.mark.slow),
        pytest.param({"recompute": True}, marks=pytest.mark.slow),
    ],
    ids=["plain", "two iterations", "recompute"],
)
def test_triton_trains_as_torch_does(settings, monkeypatch):
    expected = losses_and_gradients("torch", monkeypatch, **settings)
    got = losses_and_gradients("triton", monkeypatch, **settings)
    assert got.keys() == expected.keys()
    errors = {name: worst(got[name], expected[name]) for name in expected if expected[name] is not None}
    assert {name: error for name, error in errors.items() if not error < 1e-4} == {}
    assert [name for name in expected if expected[name] is None] == [name for name in got if got[name] is None]


@pytest.mark.slow
def test_autocast_reaches_the_kernels(monkeypatch):
    exact = losses_and_gradients("torch", monkeypatch)
    plain = losses_and_gradients("torch", monkeypatch, torch.bfloat16)
    got = losses_and_gradients("triton", monkeypatch, torch.bfloat16)
    for name in ("loss", "logprobs", "entropy"):  # no worse than torch's own bfloat16, twice
        assert worst(got[name], exact[name]) <= 2 * worst(plain[name], exact[name]) + 1e-3, name
