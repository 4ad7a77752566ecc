"""The stages' configurations: each loads, and says what the recipe says."""

from __future__ import annotations

import pytest

from fvlm.config import REPOSITORY, load_config
from fvlm.train.schedule import learning_rates
from fvlm.train.zero_config import fill, read_zero_json

MODELS = ("135m", "360m", "1b7")
CONNECTOR = {"135m": (1e-3, 3e-5), "360m": (1e-3, 3e-5), "1b7": (3e-4, 1e-5)}
BACKBONE = {"135m": (1e-5, 3e-5), "360m": (1e-5, 3e-5), "1b7": (3e-6, 1e-5)}
STAGE_2 = {"135m": 3e-5, "360m": 3e-5, "1b7": 1e-5}
STAGE_3 = {"135m": 1e-6, "360m": 1e-6, "1b7": 5e-7}


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
@pytest.mark.parametrize("model", MODELS)
def test_what_both_stages_share(model, stage):
    config = load_config(f"{stage}_{model}")
    train = config.train
    assert (config.name, config.phase, config.model.preset) == (f"{stage}_{model}", stage, model)
    assert train.total_samples == 1_000_000
    assert (train.weight_decay, train.clip, train.warmup, train.seed, train.freeze) == (0.01, 1.0, 0.03, 42, ())
    assert train.dtype == "auto"  # bf16 on a GPU, with fp32 masters
    assert train.packs_per_step % 8 == 0  # 1, 2, 4 and 8 GPUs
    mixture = config.data.mixture
    assert (mixture.text_share, mixture.looks) == (0.14, 8)
    assert mixture.tag_caps == {"chain_of_thought": 0.0005}
    assert config.best_metric == {"val_loss": -1.0}


@pytest.mark.parametrize("model", MODELS)
def test_stage_1_aligns_with_rates_that_meet(model):
    config = load_config(f"stage1_{model}")
    assert config.init_from is None  # pretrained back bones
    assert (config.train.objective, config.train.schedule) == ("ce_all", "converging")
    start, end = learning_rates(config.train, 0.03), learning_rates(config.train, 1.0)
    assert (start["connector"], end["connector"]) == pytest.approx(CONNECTOR[model])
    for group in ("dino", "llm"):
        assert (start[group], end[group]) == pytest.approx(BACKBONE[model])
    weights = config.data.mixture.weights
    assert (weights["openvid"], weights["webvid"]) == (905e3, 19e3)


@pytest.mark.parametrize("model", MODELS)
def test_stage_2_starts_from_stage_1_and_learns_answers(model):
    config = load_config(f"stage2_{model}")
    assert config.init_from == f"runs/stage1_{model}"
    assert (config.train.objective, config.train.schedule) == ("ce_answer", "cosine")
    rates = learning_rates(config.train, 0.03)
    assert list(rates.values()) == pytest.approx([STAGE_2[model]] * 3)
    assert max(learning_rates(config.train, 1.0).values()) < 0.11 * STAGE_2[model]
    sources = {"cauldron", "openvid", "webvid", "vista", "vript", "sharegpt4video", "llava_video", "smoltalk"}
    assert set(config.data.mixture.weights) == sources
    folders = {path.removeprefix("data/").removesuffix("_s2") for path in config.data.train}
    assert folders == sources


@pytest.mark.parametrize("model", MODELS)
def test_stage_3_prefers_from_stage_2_on(model):
    config = load_config(f"dpo_{model}")
    train = config.train
    assert (config.name, config.phase, config.model.preset) == (f"dpo_{model}", "dpo", model)
    assert config.init_from == f"runs/stage2_{model}"
    assert (train.objective, train.dpo_beta, train.total_samples) == ("dpo", 0.1, 83_000)
    assert (train.weight_decay, train.clip, train.warmup, train.seed, train.freeze) == (0.01, 1.0, 0.1, 42, ())
    assert (train.schedule, train.dtype, train.packs_per_step % 8) == ("cosine", "auto", 0)
    assert list(learning_rates(train, 0.1).values()) == pytest.approx([STAGE_3[model]] * 3)
    assert max(learning_rates(train, 1.0).values()) < 0.11 * STAGE_3[model]
    assert config.data.mixture.weights == {"rlaif_v": 83e3}
    assert config.best_metric == {"preference/accuracy": 1.0}


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_every_stage_runs_with_every_zero_json(ranks):
    folder = REPOSITORY / "launch/configs"
    names = [path.stem for pattern in ("stage*.yaml", "dpo_*.yaml") for path in folder.glob(pattern)]
    assert len(names) >= 9
    for name in names:
        for zero in (REPOSITORY / "ds_configs").glob("*.json"):
            filled = fill(*read_zero_json(zero.name), load_config(name).train, ranks, "bf16")
            assert filled["train_batch_size"] == filled["gradient_accumulation_steps"] * ranks


def test_the_large_models_json_reduces_in_small_buckets_and_pins_the_host():
    offload, _ = read_zero_json("zero2_offload")
    section = offload["zero_optimization"]
    assert section["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert section["overlap_comm"] is False  # or every bucket is there twice
    assert section["reduce_bucket_size"] * 2 < 0.2 * 2**30  # bytes of bf16
    assert offload["zero_force_ds_cpu_optimizer"] is False
