"""Which parameter trains at which rate, with or without decay."""

from __future__ import annotations

import importlib.util
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from spawned import run_ranks
from test_guard import run_skips
from test_zero_config import TRAIN
from torch import nn

import fvlm.train.engine
from fvlm.model import FoveatedVLM, tiny_config
from fvlm.schema import ConfigError
from fvlm.train.optimizer import (
    build_adamw,
    build_apex_adamw,
    decays,
    freeze,
    judge_before_update,
    parameter_groups,
    set_rates,
)
from fvlm.train_config import GROUPS

NO_DECAY = re.compile(r"bias$|norm\d?\.|layernorm|layer_scale|lambda1|q_static|q_init", re.IGNORECASE)


@pytest.fixture
def model():
    return FoveatedVLM(tiny_config(300))


def test_every_trained_parameter_is_in_exactly_one_group(model):
    groups = parameter_groups(model, TRAIN)
    found = [id(p) for group in groups for p in group["params"]]
    assert sorted(found) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert {group["name"] for group in groups} == set(GROUPS)
    assert {(group["name"], group["lr"]) for group in groups} == {("connector", 1e-3), ("dino", 1e-5), ("llm", 1e-5)}


def test_norms_biases_queries_and_layer_scales_do_not_decay(model):
    for name, parameter in model.named_parameters():
        assert decays(name, parameter) == (NO_DECAY.search(name) is None), name
    by_decay = {group["weight_decay"] for group in parameter_groups(model, TRAIN)}
    assert by_decay == {0.0, TRAIN.weight_decay}


def test_the_encoders_output_projection_belongs_to_the_connector(model):
    """It once trained at the backbone's rate by a naming slip (docs/model.md)."""
    connector = next(g for g in parameter_groups(model, TRAIN) if g["name"] == "connector" and g["weight_decay"])
    assert any(p is model.encoder.output_proj.weight for p in connector["params"])


def test_frozen_groups_are_left_out_and_rates_go_by_name(model):
    freeze(model, ["dino", "llm"])
    optimizer = build_adamw(model, TRAIN)
    assert {group["name"] for group in optimizer.param_groups} == {"connector"}
    set_rates(optimizer.param_groups, {"connector": 0.5, "dino": 1.0, "llm": 2.0})
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}
    freeze(model, ["connector"])
    with pytest.raises(ConfigError, match="nothing is left to train"):
        build_adamw(model, TRAIN)


def test_the_first_layers_of_the_language_model_freeze_alone(model):
    freeze(model, ["llm:2", "dino"])
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    layers = {name for name in frozen if name.startswith("llm.")}
    assert layers
    assert all(".layers.0." in name or ".layers.1." in name for name in layers)
    assert "llm.model.layers.2.mlp.up_proj.weight" not in frozen
    assert "encoder.dino.layernorm.weight" in frozen
    with pytest.raises(ConfigError, match=r"train\.freeze = llm:9: 9 layers: expected less than the model's 4"):
        freeze(FoveatedVLM(tiny_config(300)), ["llm:9"])


def test_an_optimizer_that_is_not_here_says_what_is_missing(model):
    if importlib.util.find_spec("apex") is not None:
        pytest.skip("NVIDIA apex is installed here")
    with pytest.raises(ConfigError, match=r"train\.optimizer = apex_fused: .*apex.*needs a GPU and NVIDIA apex built"):
        build_apex_adamw(model, replace(TRAIN, optimizer="apex_fused"))


def test_an_operator_that_cannot_be_built_says_so(model, monkeypatch):
    import deepspeed.ops.adam

    def cannot(*_, **__):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(deepspeed.ops.adam, "DeepSpeedCPUAdam", cannot)
    with pytest.raises(
        ConfigError, match=r"train\.optimizer = deepspeed_cpu: .*RuntimeError: no compiler.*choose adamw"
    ):
        fvlm.train.engine._optimizer(model, replace(TRAIN, optimizer="deepspeed_cpu"))


class Adding(torch.optim.Optimizer):
    """Adds its rate to every parameter, and counts."""

    def __init__(self, params):
        super().__init__(params, {"lr": 1.0})
        self.calls = 0

    def step(self, closure=None):
        self.calls += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data += group["lr"]


def test_an_optimizer_without_a_flag_is_not_called_for_a_step_that_must_not_count():
    parameter = nn.Parameter(torch.zeros(3))
    optimizer, verdict = Adding([parameter]), torch.zeros(())
    assert judge_before_update(optimizer, lambda: verdict) == "host"
    optimizer.step()
    verdict.fill_(1.0)
    optimizer.step()
    assert (optimizer.calls, parameter.tolist()) == (1, [1.0, 1.0, 1.0])


def test_torchs_fused_adamw_leaves_everything_as_it_is_where_the_flag_is_up():
    """What the guard rests on: weights, moments, decay and counter, with a gradient that is not even finite."""
    parameter, verdict = nn.Parameter(torch.randn(1000)), torch.zeros(())
    optimizer = torch.optim.AdamW([parameter], lr=1e-2, weight_decay=0.1, fused=True)
    assert judge_before_update(optimizer, lambda: verdict) == "device"
    for flag, gradient in ((0.0, 1.0), (1.0, 1.0), (1.0, math.nan)):
        before = [parameter.detach().clone(), *(t.clone() for t in optimizer.state[parameter].values())]
        verdict.fill_(flag)
        parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step()
        after = [parameter.detach(), *optimizer.state[parameter].values()]
        assert [torch.equal(a, b) for a, b in zip(before, after, strict=False)] == [bool(flag)] * len(before)
    assert float(optimizer.state[parameter]["step"]) == 1


def test_the_flag_is_where_the_masters_are_before_the_update_reads_it():
    """With offload the verdict is the device's; ZeRO-3 steps one group, and leaves the others without parameters."""

    class OnTheDevice:
        def to(self, device: torch.device) -> torch.Tensor:
            return torch.ones((), device=device)

    parameter = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([{"params": [nn.Parameter(torch.zeros(1))]}, {"params": [parameter]}], fused=True)
    optimizer.param_groups[0]["params"] = []
    judge_before_update(optimizer, OnTheDevice)
    parameter.grad = torch.ones(3)
    optimizer.step()
    assert parameter.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.slow
def test_deepspeeds_adam_on_the_cpu_is_torchs_and_leaves_out_the_same_steps(tmp_path, monkeypatch):
    """Compiled beforehand, which takes a minute or more; skipped where there is no compiler."""
    if shutil.which("g++") is None or shutil.which("ninja") is None:
        pytest.skip("needs g++ and ninja")
    # a folder of its own: a build that was killed leaves a lock behind for which torch waits forever
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    build = "from deepspeed.ops.op_builder import CPUAdamBuilder; CPUAdamBuilder().load(verbose=False)"
    subprocess.run([sys.executable, "-c", build], check=True)
    expected = run_ranks(run_skips, 1, [("fp32", "zero2_offload")])[0]["fp32", "zero2_offload"]
    found = run_ranks(run_skips, 1, [("fp32", "zero2_offload")], "deepspeed_cpu")[0]["fp32", "zero2_offload"]
    assert (expected[0], found[0]) == ("device", "host")
    assert expected[1:] == found[1:]
