"""Counted operations and parameters against torch's own counter and the models themselves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import Dinov2Config, LlamaConfig

from fvlm.model import FoveatedConfig, build_model, tiny_config
from fvlm.model.configuration import MODES, PRESETS, preset_config
from fvlm.model.flops import Sample, flops_per_sample, pack_flops, peak_flops
from fvlm.model.flops_parameters import parameter_count
from fvlm.model.padded import pack_padded

SAMPLES, FRAMES, TEXT = 2, 3, 7
POOLED = {"architecture": "multi_token"}
VARIANTS = {
    "deep": ({}, {}),
    "two iterations": ({}, {"fine_iterations": 2}),
    "coarse only": ({}, {"mode": "coarse_only"}),
    "autoregressive": ({}, {"mode": "autoregressive"}),
    "two looks": ({"tokens_per_frame": 2}, {}),
    "random queries": ({"random_queries": True}, {}),
    "shallow": ({"deep_query": False}, {}),
    "shallow, coarse only": ({"deep_query": False}, {"mode": "coarse_only"}),
    "shallow, autoregressive": ({"deep_query": False}, {"mode": "autoregressive"}),
    "1 pooled token": (POOLED | {"grid": 1}, {}),
    "4 pooled tokens": (POOLED | {"grid": 4}, {}),
    "16 pooled tokens": (POOLED | {"grid": 16}, {}),
    "narrower": ({"size": "tiny_s"}, {}),
    "frames smaller than the position table": ({"image_size": 28}, {}),
}


def plain_attention(q, k, v, attn_mask=None, dropout_p=0.0, scale=None, is_causal=False, enable_gqa=False):
    """As products, which the counter sees in full: of SDPA it counts nothing on a CPU."""
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], dim=-3) for x in (k, v))
    scores = q @ k.mT
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    return scores.softmax(-1) @ v


@pytest.fixture
def counted(monkeypatch):
    monkeypatch.setenv("FVLM_KERNELS", "reference")
    monkeypatch.setattr(F, "scaled_dot_product_attention", plain_attention)


def pack_and_flops(config: FoveatedConfig, **call):
    """A pack of equal samples, video first, and what is counted of it."""
    labels = torch.randint(3, 64, (SAMPLES, TEXT))
    side = config.image_size
    pack = pack_padded(config, torch.randn(SAMPLES, FRAMES, 3, side, side), labels, labels=labels).batch
    looks = config.grid if config.architecture == "multi_token" else config.tokens_per_frame
    flops = pack_flops(
        config,
        num_frames=SAMPLES * FRAMES,
        lengths=[FRAMES * looks + TEXT] * SAMPLES,
        coarse_lengths=[FRAMES * looks] * SAMPLES,
        num_visual=SAMPLES * FRAMES * looks,
        num_labels=len(pack.labels),
        **call,
    )
    return pack, flops, FRAMES * looks


def not_counted_by_us(config: FoveatedConfig, prefix: int, mode: str = "coarse_fine", fine_iterations: int = 1) -> int:
    """What the code computes beside what is necessary, each for its reason."""
    vision, llm = config.vision_config, config.llm_config
    looks = config.architecture == "foveated"
    triangle = 4 * llm.hidden_size * llm.num_hidden_layers  # a pair of positions in all layers
    length = prefix + TEXT
    passes = [length] * SAMPLES + [prefix] * SAMPLES * (fine_iterations if looks and mode == "coarse_fine" else 0)
    extra = sum(n * (n - 1) // 2 for n in passes) * triangle  # whole squares where causality needs the lower triangle
    if not looks:
        return extra
    projected_once = 2 * config.query_dim * vision.hidden_size
    if mode == "autoregressive":
        # looks run behind a cache, a row at a time but for the last, and then the whole sample runs again; the first
        # query is q_init, for which nothing is written
        layers = llm.num_hidden_layers * 2 * (llm.hidden_size * 3 * llm.hidden_size + 3 * llm.hidden_size * 384)
        assert llm.num_key_value_heads * 2 == llm.num_attention_heads
        again = (prefix - 1) * layers + triangle * (prefix - 1) * prefix // 2
        return extra + SAMPLES * (again - 2 * llm.hidden_size * config.query_dim)
    if not config.deep_query:
        return extra
    # the rider's row gets a K and a V that nobody needs; q_static is projected once a pack
    return extra + projected_once + SAMPLES * FRAMES * vision.num_hidden_layers * 4 * vision.hidden_size**2


@pytest.mark.parametrize(("overrides", "call"), VARIANTS.values(), ids=VARIANTS)
def test_forward_operations_equal_torchs_counter(overrides, call, counted):
    config = tiny_config(vocab_size=64, **overrides)
    pack, flops, prefix = pack_and_flops(config, **call)
    with FlopCounterMode(display=False) as counter:
        build_model(config).eval()(batch=pack, **call)
    assert counter.get_total_flops() - not_counted_by_us(config, prefix, **call) == flops.forward
    assert flops.training == flops.executed == 3 * flops.forward


@pytest.mark.parametrize(
    ("overrides", "shares"),
    [({}, (0.5, 0.5)), ({"deep_query": False}, (1.0, 0.0)), (POOLED, (0.0, 1.0))],
    ids=["deep, half", "shallow, encoder", "pooled, language model"],
)
def test_recomputed_blocks_equal_torchs_counter(overrides, shares, counted):
    config = tiny_config(vocab_size=64, **overrides)
    model = build_model(config).train()
    pack, flops, prefix = pack_and_flops(config, recompute=shares)

    def work() -> int:
        with FlopCounterMode(display=False) as counter:
            model(batch=pack).loss_sum.backward()
        return counter.get_total_flops()

    plain = work()
    model.gradient_checkpointing_enable(encoder=shares[0], llm=shares[1])
    beside = not_counted_by_us(config, prefix)  # of it, what lies in the recomputed blocks:
    spare = SAMPLES * FRAMES * config.vision_config.num_hidden_layers * 4 * 96**2 if not overrides else 0
    upper = beside - spare - (2 * 96 * 96 if not overrides else 0)
    assert work() - plain == flops.recomputed + shares[0] * spare + shares[1] * upper
    assert flops.executed == flops.training + flops.recomputed


def test_the_backward_pass_takes_twice_the_forward_but_for_the_pixels(counted):
    config = tiny_config(vocab_size=64)
    pack, _, _ = pack_and_flops(config)
    model = build_model(config).train()
    with FlopCounterMode(display=False) as counter:
        loss = model(batch=pack).loss_sum
        forward = counter.get_total_flops()
        loss.backward()
    pixels = SAMPLES * FRAMES * 2 * 16 * config.vision_config.hidden_size * 3 * 14**2
    assert counter.get_total_flops() - forward == 2 * forward - pixels


def test_samples_add_up_to_packs():
    config = preset_config("135m")
    sample = Sample.video_first(config, frames=8, text_tokens=150, labels=140)
    assert sample == Sample(frames=8, visual=8, tokens=158, coarse=8, labels=140)
    one = flops_per_sample(config, sample, fine_iterations=(1, 2))
    both = [
        pack_flops(
            config, num_frames=16, lengths=[158, 158], coarse_lengths=[8, 8], num_visual=16, num_labels=280,
            fine_iterations=iterations,
        )
        for iterations in (1, 2)
    ]  # fmt: skip
    assert sum(pack.training for pack in both) / 4 == pytest.approx(one.training, rel=1e-12)


def test_a_still_looked_at_eight_times_is_encoded_once_or_eight_times():
    config = preset_config("135m")
    still = Sample.video_first(config, frames=1, text_tokens=50, labels=40, looks=8)
    once, again = (flops_per_sample(config, still, replicated=replicated) for replicated in (False, True))
    assert again.encoder == 8 * once.encoder
    assert again.forward - again.encoder == once.forward - once.encoder
    pooled = preset_config("135m", **POOLED, grid=16)
    still = Sample.video_first(pooled, frames=1, text_tokens=50, labels=40, looks=8)
    assert still.visual == 16
    assert flops_per_sample(pooled, still, replicated=True) == flops_per_sample(pooled, still)


def test_watching_as_a_stream_costs_less_than_two_passes_and_more_than_one_look():
    config = preset_config("135m")
    sample = Sample.video_first(config, frames=64, text_tokens=100, labels=90)
    cost = {mode: flops_per_sample(config, sample, mode=mode).forward for mode in MODES}
    assert cost["coarse_only"] < cost["autoregressive"] < cost["coarse_fine"]


def test_an_unknown_mode_is_an_error():
    with pytest.raises(ValueError, match="mode='fine'"):
        flops_per_sample(preset_config("135m"), Sample(frames=1, visual=1, tokens=2, coarse=1, labels=1), mode="fine")


def unusual() -> FoveatedConfig:
    """What no preset has: biases, a gated MLP, an untied head, a narrow query."""
    llm = LlamaConfig(
        vocab_size=64, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=1, attention_bias=True, mlp_bias=True, tie_word_embeddings=False,
    )  # fmt: skip
    vision = Dinov2Config(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, mlp_ratio=4, image_size=70, patch_size=14,
        use_swiglu_ffn=True, qkv_bias=False, use_mask_token=False,
    )  # fmt: skip
    return FoveatedConfig(llm_config=llm, vision_config=vision, query_dim=24, query_logit_scale="learnable")


@pytest.mark.parametrize(
    "config",
    [
        *(preset_config(name) for name in PRESETS),
        preset_config("135m", **POOLED, grid=16),
        *(tiny_config(100, size) for size in ("tiny_s", "tiny", "tiny_l")),
        tiny_config(100, **POOLED, query_logit_scale="learnable"),
        unusual(),
    ],
    ids=[*PRESETS, "135m, pooled", "tiny_s", "tiny", "tiny_l", "tiny, pooled", "unusual"],
)
def test_parameters_equal_the_models(config):
    with torch.device("meta"):
        model = build_model(config)
    model.requires_grad_(True)  # the mask token counts too
    groups = {name: sum(p.numel() for _, p in named) for name, named in model.param_groups().items()}
    found = parameter_count(config)
    assert {"connector": found.connector, "dino": found.vision, "llm": found.llm} == groups
    assert found.total == sum(p.numel() for p in model.parameters())
    assert found.llm_embedding == sum(
        p.numel() for p in {model.llm.lm_head.weight, model.llm.model.embed_tokens.weight}
    )
    assert found.vision_embedding == sum(p.numel() for p in model.encoder.dino.embeddings.parameters())


def test_a_gated_mlp_is_counted_as_torch_does(counted):
    config = unusual()
    pack, flops, prefix = pack_and_flops(config)
    with FlopCounterMode(display=False) as counter:
        build_model(config).eval()(batch=pack)
    llm, vision = config.llm_config, config.vision_config
    passes = [prefix + TEXT] * SAMPLES + [prefix] * SAMPLES
    upper = sum(n * (n - 1) // 2 for n in passes) * 4 * 32 * llm.num_hidden_layers
    spare = SAMPLES * FRAMES * vision.num_hidden_layers * 4 * vision.hidden_size**2
    extra = upper + spare + 2 * config.query_dim * vision.hidden_size
    assert counter.get_total_flops() - extra == flops.forward


def test_peak_rates_by_reported_names():
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA GeForce RTX 5090") == 209.5e12
    assert peak_flops("Some other card") is None
