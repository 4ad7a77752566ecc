"""Which parameter trains at which rate, with or without decay."""

from __future__ import annotations

import re

import pytest
from test_zero_config import TRAIN

from fvlm.config import GROUPS
from fvlm.model import FoveatedVLM, tiny_config
from fvlm.schema import ConfigError
from fvlm.train.optimizer import build_adamw, decays, freeze, parameter_groups, set_rates

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
