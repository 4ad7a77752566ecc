"""AdamW with one learning rate a parameter group and weight decay where it belongs."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fvlm.schema import ConfigError
from fvlm.train_config import GROUPS, TrainConfig

QUERIES = ("q_static", "q_init")
LLM_BOTTOM = "llm_bottom"
_LAYER = re.compile(r"\.layers\.(\d+)\.")


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: not to queries, nor to vectors (norms, biases, layer-scales)."""
    return parameter.ndim > 1 and name.rsplit(".", 1)[-1] not in QUERIES


def freeze(model: nn.Module, groups: Iterable[str]) -> None:
    """Exclude parameter groups from training, in place; `llm:8` is the language model's first eight layers."""
    frozen = []
    for group in groups:
        name, _, layers = group.partition(":")
        frozen += parts(model, int(layers), f"train.freeze = {group}")[LLM_BOTTOM] if layers else parts(model)[name]
    for _, parameter in frozen:
        parameter.requires_grad_(False)


def parts(
    model: nn.Module, llm_bottom: int | None = None, asked_by: str = "train.freeze or train.guard.llm_bottom"
) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Part → (name, parameter) of what trains and freezes together: the groups, and the LLM's first layers if asked.

    The token embedding, which SmolLM2 uses as its head too, stays with `llm`. Raises ConfigError if `llm_bottom` leaves
    no layer above.
    """
    named = model.param_groups()
    if llm_bottom is None:
        return named
    layers = {name: int(found[1]) for name, _ in named["llm"] if (found := _LAYER.search(name))}
    num_layers = max(layers.values(), default=-1) + 1
    if llm_bottom >= num_layers:
        raise ConfigError(f"{asked_by}: {llm_bottom} layers: expected less than the model's {num_layers}")
    bottom = [(name, p) for name, p in named["llm"] if layers.get(name, num_layers) < llm_bottom]
    top = [(name, p) for name, p in named["llm"] if layers.get(name, num_layers) >= llm_bottom]
    return {**named, "llm": top, LLM_BOTTOM: bottom}


def parameter_groups(model: nn.Module, train: TrainConfig) -> list[dict]:
    """Optimizer groups `{name, part, params, lr, weight_decay}`: connector, dino and llm, each with and without decay.

    A group without parameters is left out; `part` is that of `parts`, `name` says whose rate it has. Raises ConfigError
    if nothing is left to train.
    """
    groups = []
    by_part = parts(model, train.llm_bottom)
    for part in (*GROUPS, LLM_BOTTOM):
        name = "llm" if part == LLM_BOTTOM else part
        trained = [(n, p) for n, p in by_part.get(part, ()) if p.requires_grad]
        for decay in (True, False):
            parameters = [p for n, p in trained if decays(n, p) == decay]
            if parameters:
                rate = getattr(train.learning_rate, name).base
                weight_decay = train.weight_decay if decay else 0.0
                group = {"name": name, "part": part, "params": parameters, "lr": rate, "weight_decay": weight_decay}
                groups.append(group)
    if not groups:
        raise ConfigError(f"train.freeze = {list(train.freeze)}: nothing is left to train")
    return groups


def build_adamw(model: nn.Module, train: TrainConfig) -> torch.optim.AdamW:
    """torch's fused AdamW over `parameter_groups`."""
    return torch.optim.AdamW(parameter_groups(model, train), fused=True, **hyperparameters(train))


def build_apex_adamw(model: nn.Module, train: TrainConfig) -> torch.optim.Optimizer:
    """NVIDIA apex's FusedAdam over `parameter_groups`. Raises ConfigError where apex is missing or has no kernels."""
    try:
        from apex.optimizers import FusedAdam

        return FusedAdam(parameter_groups(model, train), adam_w_mode=True, **hyperparameters(train))
    except (ImportError, RuntimeError) as error:
        raise ConfigError(
            f"train.optimizer = apex_fused: {error}; it needs a GPU and NVIDIA apex built with its CUDA extensions "
            f"from https://github.com/NVIDIA/apex (apex of PyPI is another project); or choose adamw"
        ) from error


def hyperparameters(train: TrainConfig) -> dict[str, Any]:
    """Arguments that all AdamW implementations share, beside the groups' rates and decay."""
    return {"betas": tuple(train.betas), "eps": train.eps}


def set_rates(param_groups: list[dict], rates: Mapping[str, float], frozen: Collection[str] = ()) -> None:
    """Write each group's learning rate, found by the group's name; 0 for the parts that are frozen."""
    for group in param_groups:
        group["lr"] = 0.0 if group["part"] in frozen else rates[group["name"]]


def pass_over(optimizer: torch.optim.Optimizer, frozen: Callable[[], Collection[str]]) -> None:
    """Let every `optimizer.step()` leave the groups of `frozen()` parts alone: weights, moments and counters."""
    step = optimizer.step

    def step_of_the_others(*args: Any, **kwargs: Any) -> Any:
        groups = optimizer.param_groups
        optimizer.param_groups = [group for group in groups if group["part"] not in frozen()]
        try:
            return step(*args, **kwargs) if optimizer.param_groups else None
        finally:
            optimizer.param_groups = groups

    optimizer.step = step_of_the_others


def judge_before_update(optimizer: torch.optim.Optimizer, verdict: Callable[[], Tensor]) -> str:
    """Let every `optimizer.step()` do nothing where `verdict()` is 1; returns where that is decided.

    On the `device` with torch's fused AdamW: its kernel reads the flag, and a step that does not count changes neither
    weights nor moments nor counters. The others have no such input: the `host` reads the flag and leaves out the call.
    """

    def raise_flag(chosen: torch.optim.Optimizer, *_: Any) -> None:
        masters = [parameter for group in chosen.param_groups for parameter in group["params"]]
        if masters:  # ZeRO-3 steps part by part, also where all of a part is frozen
            # Offloaded ones: AdamW would copy the flag without waiting, and its CPU kernel read it too early.
            chosen.found_inf = verdict().to(masters[0].device)

    if isinstance(optimizer, torch.optim.AdamW) and optimizer.defaults["fused"]:
        optimizer.register_step_pre_hook(raise_flag)
        return "device"
    step = optimizer.step

    def step_that_counts(*args: Any, **kwargs: Any) -> Any:
        return None if verdict().item() else step(*args, **kwargs)

    optimizer.step = step_that_counts
    return "host"
