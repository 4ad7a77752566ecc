"""AdamW with one learning rate a parameter group and weight decay where it belongs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from fvlm.config import GROUPS, TrainConfig
from fvlm.schema import ConfigError

QUERIES = ("q_static", "q_init")


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: not to queries, nor to vectors (norms, biases, layer-scales)."""
    return parameter.ndim > 1 and name.rsplit(".", 1)[-1] not in QUERIES


def freeze(model: nn.Module, groups: Iterable[str]) -> None:
    """Exclude parameter groups from training, in place."""
    named = model.param_groups()
    for group in groups:
        for _, parameter in named[group]:
            parameter.requires_grad_(False)


def parameter_groups(model: nn.Module, train: TrainConfig) -> list[dict]:
    """Optimizer groups `{name, params, lr, weight_decay}`: connector, dino and llm, each with and without decay.

    A group without parameters is left out. Raises ConfigError if nothing is left to train.
    """
    groups = []
    named = model.param_groups()
    for name in GROUPS:
        trained = [(n, p) for n, p in named[name] if p.requires_grad]
        for decay in (True, False):
            parameters = [p for n, p in trained if decays(n, p) == decay]
            if parameters:
                rate = getattr(train.learning_rate, name).base
                weight_decay = train.weight_decay if decay else 0.0
                groups.append({"name": name, "params": parameters, "lr": rate, "weight_decay": weight_decay})
    if not groups:
        raise ConfigError(f"train.freeze = {list(train.freeze)}: nothing is left to train")
    return groups


def build_adamw(model: nn.Module, train: TrainConfig) -> torch.optim.AdamW:
    """torch's fused AdamW over `parameter_groups`."""
    return torch.optim.AdamW(parameter_groups(model, train), betas=tuple(train.betas), eps=train.eps, fused=True)


def set_rates(param_groups: list[dict], rates: Mapping[str, float]) -> None:
    """Write each group's learning rate, found by the group's name."""
    for group in param_groups:
        group["lr"] = rates[group["name"]]
