"""Counted operations against torch's own counter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from fvlm.model import build_model, tiny_config
from fvlm.model.flops import pack_flops, peak_flops
from fvlm.model.padded import pack_padded


@pytest.mark.parametrize(
    ("overrides", "iterations"),
    [
        ({}, 1),
        ({}, 2),
        ({"deep_query": False}, 1),
        ({"architecture": "multi_token", "grid": 4}, 1),
        ({"image_size": 28}, 1),
    ],
    ids=["deep", "two iterations", "shallow", "multi-token", "frames smaller than the position table"],
)
def test_forward_operations_equal_torchs_counter(overrides, iterations, monkeypatch):
    monkeypatch.setenv("FVLM_KERNELS", "reference")  # attention as plain products, which the counter sees in full
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: (q @ k.mT).softmax(-1) @ v)
    config = tiny_config(vocab_size=64, **overrides)
    model = build_model(config)
    samples, frames, text = 2, 3, 7
    looks = config.grid if overrides.get("architecture") else 1
    labels = torch.randint(3, 64, (samples, text))
    pack = pack_padded(
        config, torch.randn(samples, frames, 3, config.image_size, config.image_size), labels, labels=labels
    ).batch
    with FlopCounterMode(display=False) as counter:
        model(batch=pack, fine_iterations=iterations)
    lengths, coarse = [frames * looks + text] * samples, [frames * looks] * samples
    flops = pack_flops(
        config,
        num_frames=samples * frames,
        lengths=lengths,
        coarse_lengths=coarse,
        num_visual=samples * frames * looks,
        num_labels=len(pack.labels),
        fine_iterations=iterations,
    )
    # the counter sees whole squares where causality needs the lower triangle
    passes = lengths + (coarse * iterations if not looks > 1 else [])
    upper = (
        sum(n * (n - 1) / 2 for n in passes) * 4 * config.llm_config.hidden_size * config.llm_config.num_hidden_layers
    )
    rotary = sum(passes) * 32  # positions times frequencies, computed as a product by transformers
    # the rider's row gets a K and a V that nobody needs: one row in 257 instead of a copy of all others
    vision = config.vision_config
    rides = looks == 1 and config.deep_query
    spare = samples * frames * vision.num_hidden_layers * 4 * vision.hidden_size**2 if rides else 0
    assert counter.get_total_flops() - upper - rotary - spare == pytest.approx(flops.forward, rel=1e-3)
    assert flops.training == 3 * flops.forward


def test_peak_rates_by_reported_names():
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA GeForce RTX 5090") == 209.5e12
    assert peak_flops("Some other card") is None
