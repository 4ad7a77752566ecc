"""Adapters beside frozen matrices: what is saved is an ordinary model, what is resumed is bit for bit the same."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from launched import step_records
from safetensors.torch import load_file
from spawned import run_ranks
from test_variants import train_config
from test_zero_on_the_model import PLANNED, RATES, VOCABULARY, model, packs, settings

from fvlm.config import load_config
from fvlm.data.chat import load_tokenizer
from fvlm.model import FoveatedVLM, build_model, tiny_config
from fvlm.schema import ConfigError
from fvlm.train import lora
from fvlm.train.build import load_model
from fvlm.train.dry_run import meta_model
from fvlm.train.engine import Engine, World
from fvlm.train.loop import Trainer
from fvlm.train.memory import count_parameters
from fvlm.train.optimizer import build_adamw, set_rates
from fvlm.train.zero_config import read_zero_json
from fvlm.train_config import LoraConfig

pytest.importorskip("peft")
KINDS = {"lora": LoraConfig(rank=4, alpha=8.0), "dora": LoraConfig(rank=4, alpha=8.0, dora=True)}
SCALING = 2.0


def adapted(chosen: LoraConfig):
    net = model()
    lora.add_adapters(net, chosen, seed=1)
    return net


def disturb(net) -> None:
    """Adapters as after some training; they begin as zero."""
    torch.manual_seed(3)
    for name, parameter in net.named_parameters():
        if ".lora_" in name:
            parameter.data += 0.05 * torch.randn_like(parameter)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_weights_are_an_ordinary_model_that_computes_the_same(kind, tmp_path):
    net = adapted(KINDS[kind]).eval()
    batch = packs()[0]
    start = model().eval()(batch=batch).logprobs
    torch.testing.assert_close(net(batch=batch).logprobs, start, rtol=0, atol=1e-5)
    disturb(net)
    expected = net(batch=batch).logprobs.detach()
    assert (expected - start).abs().max() > 0.1
    net.save_pretrained(tmp_path, state_dict=lora.merge(net.state_dict(), SCALING))
    found = FoveatedVLM.from_pretrained(tmp_path)(batch=batch).logprobs
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_is_pefts(kind):
    net = adapted(KINDS[kind])
    disturb(net)
    merged = lora.merge(net.state_dict(), SCALING)
    for name, module in net.named_modules():
        if hasattr(module, "base_layer"):
            module.merge()
            torch.testing.assert_close(merged[f"{name}.weight"], module.base_layer.weight.data, rtol=1e-5, atol=1e-6)
    assert merged.keys() == model().state_dict().keys()


def test_only_the_trunks_adapters_and_the_other_groups_train():
    net = adapted(replace(KINDS["lora"], targets=r"layers\.[01]\..*\.(q|v)_proj"))
    trained = {name for name, parameter in net.named_parameters() if parameter.requires_grad}
    ends = [f"{p}_proj.lora_{x}.default.weight" for p in "qv" for x in "AB"]
    paths = {f"llm.model.layers.{n}.self_attn.{end}" for n in "01" for end in ends}
    assert {name for name in trained if name.startswith("llm.")} == paths
    assert {name for name, _ in net.param_groups()["llm"]} == paths
    whole = {name for name, parameter in model().named_parameters() if parameter.requires_grad}
    assert trained - paths == {name for name in whole if not name.startswith("llm.")}
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), adapted_again(net), strict=True))


def adapted_again(net):
    torch.manual_seed(99)  # the seed of the adapters is their own
    return adapted(replace(KINDS["lora"], targets=r"layers\.[01]\..*\.(q|v)_proj")).parameters()


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("q_proj", "qproj"), r"train\.lora\.targets: 'qproj' is no linear layer.*down_proj, gate_proj"),
        (("embed_tokens",), "'embed_tokens' is no linear layer"),
        (("lm_head",), "'lm_head' is no linear layer"),
        ("q_proj", r"or a regular expression for whole paths such as layers\.0\.self_attn\.q_proj"),
    ],
)
def test_a_target_that_is_no_linear_layer_of_the_trunk_is_refused(targets, message):
    with pytest.raises(ConfigError, match=message):
        lora.add_adapters(build_model(tiny_config(VOCABULARY)), LoraConfig(targets=targets), seed=0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.lora.rank=0"], r"train\.lora\.rank = 0: expected at least 1"),
        (["train.lora.alpha=0"], r"train\.lora\.alpha"),
        (["train.lora.targets=[]"], r"train\.lora\.targets"),
        (["train.lora.targets='('"], r"train\.lora\.targets = '\(': not a regular expression"),
        (["train.lora.dropout=0.1"], r"unknown key train\.lora\.dropout"),
        (["train.lora={}", "train.freeze=[llm]"], r"train\.freeze\[0\] = 'llm': expected no part of the language"),
        (["train.lora={}", "train.freeze=['llm:2']"], r"train\.freeze\[0\] = 'llm:2': expected no part"),
    ],
)
def test_contradictions_name_their_key(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config("tiny_test", overrides)


def test_what_is_needed_is_named_where_peft_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ConfigError, match=r"train\.lora: .*peft.*pip install -c constraints\.txt peft"):
        adapted(KINDS["lora"])


def test_a_plan_counts_the_adapters_alone():
    geometry = model().config
    whole, few = (count_parameters(meta_model(geometry, torch.bfloat16, lora=x)) for x in (None, KINDS["dora"]))
    real = count_parameters(adapted(KINDS["dora"]))
    assert (few.all, few.trained) == (real.all, real.trained)
    assert few.trained < whole.trained


# -- under DeepSpeed ------------------------------------------------------------------------------------------------

FEW = [("dora", 3, True)]
MANY = [("lora", 1, True), ("lora", 2, False), ("lora", 3, False), ("dora", 0, True), ("dora", 2, False)]


def train_settings(kind: str, checkpointing: bool):
    return replace(settings(checkpointing), lora=KINDS[kind])


def plain(kind: str) -> list[float]:
    net, losses = adapted(KINDS[kind]).train(), []
    optimizer = build_adamw(net, train_settings(kind, False))
    for step in range(3):
        total = sum(net(batch=batch, fine_iterations=1 + step % 2).loss_sum for batch in packs())
        (total / PLANNED).backward()
        set_rates(optimizer.param_groups, RATES)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item())
    return losses


def run_engines(world: World, cases: list[tuple[str, int, bool]]) -> list[list[float]]:
    found = []
    for kind, stage, checkpointing in cases:
        zero, origin = read_zero_json(f"zero{stage}")
        if stage == 3:  # small parameters would otherwise stay whole on every rank
            zero["zero_optimization"] |= {"stage3_param_persistence_threshold": 0}
            zero["zero_optimization"] |= {"stage3_model_persistence_threshold": 0}
        engine, losses = Engine(adapted(KINDS[kind]), train_settings(kind, checkpointing), zero, origin, world), []
        for step in range(3):
            total = torch.zeros(1, dtype=torch.float64)
            for batch in packs()[world.rank :: world.size]:
                out = engine.forward(batch=batch, fine_iterations=1 + step % 2)
                engine.backward(out.loss_sum, PLANNED)
                total += out.loss_sum.item()
            engine.step(RATES)
            losses.append(world.sum(total).item())
        found.append(losses)
    return found


@pytest.mark.parametrize("cases", [FEW, pytest.param(MANY, marks=pytest.mark.slow)], ids=["few", "many"])
def test_every_stage_trains_adapters_as_plain_torch_does(cases):
    expected = {kind: plain(kind) for kind in {case[0] for case in cases}}
    for by_case in run_ranks(run_engines, 2, cases):
        for (kind, *_), losses in zip(cases, by_case, strict=True):
            assert losses == pytest.approx(expected[kind], rel=1e-5)
            assert losses[-1] < losses[0]


# -- a run ----------------------------------------------------------------------------------------------------------

RUN = ["train.lora={rank: 4, dora: true}", "train.freeze=[{part: llm, until: 0.6}, connector]", "data.val=[]",
       "train.checkpoint_every=1", "train.probe_every=0"]  # fmt: skip
CRASH = 4
"""The step that is not made: the checkpoint of step 2, while the adapters are frozen, is published by then."""


class Crash(RuntimeError):
    """The process dies."""


def run_twice(world: World, shards: Path, out: Path) -> None:
    """A run undisturbed, and one that dies and is started again."""
    from launch.train import train

    def step_or_crash(trainer, loaded):
        if loaded.step.index + 1 == CRASH:
            raise Crash
        return step(trainer, loaded)

    step = Trainer.step
    train(train_config(shards, out / "whole", *RUN), read_zero_json("zero3"), world)
    with patch.object(Trainer, "step", step_or_crash), pytest.raises(Crash):
        train(train_config(shards, out / "cut", *RUN), read_zero_json("zero3"), world)
    shutil.rmtree(out / "cut" / "checkpoints" / "step-00000003", ignore_errors=True)
    shutil.copytree(out / "cut" / "checkpoints" / "step-00000002", out / "early")
    train(train_config(shards, out / "cut", *RUN), read_zero_json("zero3"), world)


@pytest.fixture(scope="module")
def runs(shards, tmp_path_factory):
    out = tmp_path_factory.mktemp("lora")
    run_ranks(run_twice, 1, shards, out)
    return out


def newest(out: Path) -> Path:
    return out / "checkpoints" / (out / "checkpoints" / "latest").read_text().strip()


@pytest.mark.slow
def test_a_resumed_run_has_the_same_adapters_bit_for_bit(runs):
    assert step_records(runs / "cut") == step_records(runs / "whole")
    files = ["engine/base.safetensors", "engine/rank-00000.safetensors", "weights/model.safetensors"]
    for file in files:
        whole, cut = (load_file(newest(runs / name) / file) for name in ("whole", "cut"))
        assert all(torch.equal(value, cut[name]) for name, value in whole.items()), file


@pytest.mark.slow
def test_a_checkpoints_weights_are_an_ordinary_model_and_its_base_the_start(runs, shards):
    config = train_config(shards, runs / "whole", *RUN)
    start = load_model(replace(config, train=replace(config.train, lora=None)), len(load_tokenizer("tiny")))
    initial = start.state_dict()
    for name, value in load_file(newest(runs / "whole") / "engine/base.safetensors").items():
        assert torch.equal(value, initial[name.replace(".base_layer.", ".")]), name
    found = FoveatedVLM.from_pretrained(newest(runs / "whole") / "weights").state_dict()
    for name, value in found.items():
        if name.startswith(("llm.", "dino_to_llm.")):  # the connector is frozen
            assert torch.equal(value, initial[name]) != ("_proj." in name), name
    assert not torch.equal(found["encoder.dino.layernorm.weight"], initial["encoder.dino.layernorm.weight"])
    again = load_model(train_config(shards, runs / "next", f"init_from={runs / 'whole'}"), len(load_tokenizer("tiny")))
    assert all(torch.equal(value, found[name]) for name, value in again.state_dict().items())


@pytest.mark.slow
def test_adapters_that_are_still_frozen_leave_the_model_as_it_was(runs, shards):
    start = load_model(train_config(shards, runs / "whole"), len(load_tokenizer("tiny"))).state_dict()
    early = FoveatedVLM.from_pretrained(runs / "early" / "weights").state_dict()
    for name, value in early.items():
        if name.startswith("llm."):
            torch.testing.assert_close(value, start[name], rtol=0, atol=1e-6, msg=name)
    records = step_records(runs / "whole")
    seen = [record["samples_seen"] / records[-1]["samples_seen"] for record in records]
    assert [record["lr_llm"] == 0 for record in records] == [share <= 0.6 for share in seen]
    assert (records[1]["lr_llm"], records[-1]["lr_llm"] > 0) == (0, True)
