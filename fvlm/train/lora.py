"""LoRA and DoRA, through `peft`: small trained matrices beside the language model's own, which are frozen.

Only linear layers of the language model's trunk are adapted: the head, the encoder and the connector are read by their
weights in places, where an adapter would go unnoticed. What a run saves as its weights are the merged ones, an ordinary
model; its checkpoint holds the frozen ones as well, which rounding would not let anyone recover from the sum.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fvlm.schema import ConfigError
from fvlm.train.optimizer import freeze
from fvlm.train_config import LoraConfig

BASE = ".base_layer."
FILE = "engine/base.safetensors"
"""Of a checkpoint: the frozen weights behind the adapters."""
_A, _B, _LENGTH = ".lora_A.default.weight", ".lora_B.default.weight", ".lora_magnitude_vector.default.weight"


def add_adapters(model: nn.Module, lora: LoraConfig, seed: int) -> None:
    """Freeze the language model and put an adapter on each target, in place; the model computes what it did before.

    The adapters' initial values depend on `seed` alone. Raises ConfigError where `peft` is missing, or a target is no
    linear layer of the trunk.
    """
    try:
        import peft
    except ImportError as error:
        raise ConfigError(f"train.lora: {error}; install it with: pip install -c constraints.txt peft") from error
    freeze(model, ["llm"])
    trunk = model.llm.model
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        target_modules=_find(trunk, lora.targets),
        use_dora=lora.dora,
        bias="none",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, trunk)


def _find(trunk: nn.Module, targets: str | tuple[str, ...]) -> list[str]:
    """Paths of the linear layers that `targets` names; raises ConfigError for a name that finds none."""
    linear = [path for path, module in trunk.named_modules() if isinstance(module, nn.Linear)]
    known = sorted({path.rsplit(".", 1)[-1] for path in linear})
    found: set[str] = set()
    for target in [targets] if isinstance(targets, str) else targets:
        pattern = target if isinstance(targets, str) else rf"(.*\.)?{re.escape(target)}"
        matching = [path for path in linear if re.fullmatch(pattern, path)]
        if not matching:
            raise ConfigError(
                f"train.lora.targets: {target!r} is no linear layer of the language model's trunk: expected some of "
                f"{', '.join(known)}, or a regular expression for whole paths such as {linear[0]}"
            )
        found.update(matching)
    return sorted(found)


def base_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those weights of a model's state that are frozen behind adapters; empty without adapters."""
    return {name: tensor for name, tensor in state.items() if BASE in name}


def merge(state: Mapping[str, Tensor], scaling: float) -> dict[str, Tensor]:
    """The state of a model with adapters as that of an ordinary one; merged matrices are float32, the rest as it was.

    W + s B A, and for DoRA each row of it with the trained length, where s is alpha / rank.
    """
    merged = {name.replace(BASE, "."): tensor for name, tensor in state.items() if ".lora_" not in name}
    for name in [name for name in state if name.endswith(_A)]:
        layer = name.removesuffix(_A)
        weight = state[f"{layer}{BASE}weight"].float()
        weight = weight + scaling * (state[layer + _B].float() @ state[name].float())
        if (length := state.get(layer + _LENGTH)) is not None:
            weight = weight * (length.float() / torch.linalg.vector_norm(weight, dim=1)).unsqueeze(1)
        merged[f"{layer}.weight"] = weight
    return merged


def restore_base(model: nn.Module, checkpoint: Path) -> None:
    """Set the frozen weights behind the adapters to those of a checkpoint of the same run."""
    found = load_file(checkpoint / FILE)
    with torch.no_grad():
        for name, parameter in base_weights(model.state_dict(keep_vars=True)).items():
            parameter.copy_(found[name])
