"""Where DeepSpeed's optimizers keep the fp32 master weights and Adam's moments of each parameter, on this rank.

Every ZeRO stage cuts the flattened parameters differently; all of them come down to stretches of one parameter that lie
somewhere in one tensor of the optimizer. What reads and writes checkpoints knows nothing else about a stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")
Named = Sequence[tuple[str, nn.Parameter]]


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """Elements [start, start + numel) of the flattened parameter `name`."""

    name: str
    start: int
    numel: int
    master: Tensor
    """fp32 tensor that the optimizer updates, key of its state; it may hold many fragments."""
    offset: int
    """Where in the flattened `master` the fragment begins."""
    group: dict[str, Any]
    """The optimizer's group."""

    def of(self, tensor: Tensor) -> Tensor:
        """The fragment's elements in `tensor`, which is shaped as `master`; a view, [numel]."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.numel)


def locate(optimizer: Any, groups: Sequence[dict[str, Any]], named: Sequence[Named], rank: int) -> list[Fragment]:
    """What this rank keeps; under stage 0 that is everything, on every rank.

    Args:
        optimizer: DeepSpeed's, or torch's own under stage 0 in fp32.
        groups: the inner optimizer's groups.
        named: names and parameters of each group.
        rank: of this process.
    """
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return _of_stage_3(optimizer, groups, named, rank)
    for attribute in ("single_partition_of_fp32_groups", "fp32_groups_flat_partition"):  # stages 1, 2; 1 in bf16
        if hasattr(optimizer, attribute):
            return _of_partitions(getattr(optimizer, attribute), groups, named)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise NotImplementedError(f"checkpoints know nothing of DeepSpeed's {type(optimizer).__name__}")
    return [  # stage 0: the parameters are the masters
        Fragment(name=name, start=0, numel=parameter.numel(), master=parameter, offset=0, group=group)
        for group, part in zip(groups, named, strict=True)
        for name, parameter in part
    ]


def refresh(optimizer: Any) -> None:
    """Set the weights that the model computes with to the master weights; collective."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        for number, (low, high) in enumerate(
            zip(optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat, strict=True)
        ):
            low.data.copy_(high.data)
            optimizer._unflatten_partitioned_parameters(number)
        if kept_whole := optimizer.persistent_parameters:
            kept_whole[0].partition(kept_whole)
            kept_whole[0].all_gather(kept_whole)
    elif hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()


def step_of(optimizer: torch.optim.Optimizer, fragment: Fragment) -> int:
    """Adam's step of a fragment: kept with the tensor, or, by apex, with the group; 0 before the first."""
    return int(optimizer.state.get(fragment.master, {}).get("step", fragment.group.get("step", 0)))


def set_step(optimizer: torch.optim.Optimizer, fragment: Fragment, step: int) -> None:
    """Undo of `step_of`, in the optimizer's own form."""
    if type(optimizer).__module__.startswith("apex."):
        fragment.group["step"] = step
    elif isinstance(optimizer, torch.optim.AdamW):
        on_device = fragment.group["fused"] or fragment.group["capturable"]
        device = fragment.master.device if on_device else torch.device("cpu")
        optimizer.state[fragment.master]["step"] = torch.tensor(float(step), dtype=torch.float32, device=device)
    else:
        optimizer.state[fragment.master]["step"] = step


def moment(optimizer: torch.optim.Optimizer, fragment: Fragment, name: str) -> Tensor | None:
    """A fragment of `exp_avg` or `exp_avg_sq`, [numel]; None before the first step, where it is zero."""
    whole = optimizer.state.get(fragment.master, {}).get(name)
    return None if whole is None else fragment.of(whole)


def make_moments(optimizer: torch.optim.Optimizer, fragment: Fragment) -> None:
    """Give the fragment's tensor zero moments unless it has some."""
    state = optimizer.state[fragment.master]
    for name in MOMENTS:
        if name not in state:
            state[name] = torch.zeros_like(fragment.master, memory_format=torch.preserve_format).detach()


def _of_stage_3(optimizer: Any, groups: Sequence[dict], named: Sequence[Named], rank: int) -> list[Fragment]:
    """Each parameter is cut into equal parts, the last ones padded; the parts of a rank lie one after the other."""
    if optimizer.swap_optimizer:
        raise NotImplementedError("optimizer states offloaded to NVMe cannot be saved; offload to the CPU instead")
    found = []
    for group, part in zip(groups, named, strict=True):
        for name, parameter in part:
            number, offset, numel = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = rank * numel
            numel = min(numel, parameter.ds_numel - start)
            if numel > 0:
                master = optimizer.fp32_partitioned_groups_flat[number]
                found.append(Fragment(name=name, start=start, numel=numel, master=master, offset=offset, group=group))
    return found


def _of_partitions(masters: Sequence[Tensor], groups: Sequence[dict], named: Sequence[Named]) -> list[Fragment]:
    """A group's flattened parameters are cut into one stretch a rank; DeepSpeed notes the place of each parameter."""
    found = []
    for master, group, part in zip(masters, groups, named, strict=True):
        for name, parameter in part:
            if (mapping := parameter._hp_mapping) is not None:
                low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
                places = {"start": low.start, "numel": low.numel, "offset": high.start}
                found.append(Fragment(name=name, master=master, group=group, **places))
    return found
