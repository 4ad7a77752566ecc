"""Engine state on disk, in a form that knows nothing of ranks and ZeRO stages, so that any of them can read it.

engine/engine.json               parameters and their sizes, groups with their rates, counters, who wrote it
engine/base.safetensors          what LoRA's adapters are added to, where a run has some (`fvlm.train.lora`)
engine/rank-00000.safetensors    `master`, `exp_avg`, `exp_avg_sq`: fp32, one dimension, the rank's pieces in a row; in
                                 its header, under `pieces`: [name, first element, number, Adam's step] of each

Every element of every trained parameter is in exactly one file, which is checked before anything is restored. A rank
reads the stretches that it keeps, wherever they are; nothing is gathered, nothing is unpickled.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fvlm.train import lora
from fvlm.train.fragments import MOMENTS, Fragment, make_moments, moment, set_step, step_of

KINDS = ("master", *MOMENTS)
FOLDER, COMMON = "engine", "engine.json"
HYPERPARAMETERS = ("lr", "weight_decay", "betas", "eps")


class CheckpointError(OSError):
    """A checkpoint that cannot be written, or that does not fit the engine."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A model's weights, copied to the host, to be written while the model goes on."""

    model: nn.Module
    state: dict[str, Tensor]
    scaling: float
    """Of LoRA's adapters, where the model has some."""

    @classmethod
    def of(cls, model: nn.Module, scaling: float = 1.0) -> Weights:
        """The weights as they are now; names of one tensor share its copy."""
        copies: dict[tuple, Tensor] = {}
        state = {}
        for name, tensor in model.state_dict().items():
            place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            if place not in copies:
                copies[place] = tensor.detach().to("cpu", copy=True)
            state[name] = copies[place]
        return cls(model=model, state=state, scaling=scaling)

    @property
    def num_bytes(self) -> int:
        """Size of the tensors, and of the merged matrices that are written beside them."""
        own = sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in self.state.values()}.values())
        return own + sum(4 * tensor.numel() for tensor in lora.base_weights(self.state).values())

    def write(self, folder: Path) -> None:
        """As `from_pretrained` reads them, with the adapters merged."""
        self.model.save_pretrained(folder, state_dict=lora.merge(self.state, self.scaling))

    def write_base(self, path: Path) -> None:
        """What the adapters are added to."""
        save_file(lora.base_weights(self.state), path)


@dataclass(frozen=True, kw_only=True)
class EngineState:
    """One rank's share of an engine, copied to the host."""

    rank: int
    tensors: dict[str, Tensor]
    """`KINDS`, each fp32 [elements of the pieces]."""
    pieces: list[tuple[str, int, int, int]]
    """(name, first element, number, Adam's step), in the order of the tensors."""
    common: dict[str, Any] | None
    """Contents of `engine.json`, on rank 0."""
    weights: Weights | None
    """On rank 0."""

    @property
    def num_bytes(self) -> int:
        """What the files take, headers aside."""
        own = sum(tensor.nbytes for tensor in self.tensors.values())
        return own + (self.weights.num_bytes if self.weights is not None else 0)

    def files(self) -> dict[str, Callable[[Path], Any]]:
        """What to write, by name below the checkpoint's folder."""
        metadata = {"pieces": json.dumps(self.pieces)}
        found = {f"{FOLDER}/{file_name(self.rank)}": lambda path: save_file(self.tensors, path, metadata)}
        if self.common is not None:
            text = json.dumps(self.common, indent=1)
            found[f"{FOLDER}/{COMMON}"] = lambda path: path.write_text(text, encoding="utf-8")
        if self.weights is not None:
            found["weights"] = self.weights.write
            if lora.base_weights(self.weights.state):
                found[lora.FILE] = self.weights.write_base
        return found


def file_name(rank: int) -> str:
    """File of one rank's pieces."""
    return f"rank-{rank:05d}.safetensors"


def share(fragments: Sequence[Fragment], rank: int, size: int) -> list[Fragment]:
    """The part that `rank` of `size` writes of fragments that all of them keep: equal stretches of all elements."""
    total = sum(fragment.numel for fragment in fragments)
    first, end = total * rank // size, total * (rank + 1) // size
    found, position = [], 0
    for fragment in fragments:
        left, right = max(first, position), min(end, position + fragment.numel)
        if left < right:
            cut = left - position
            places = {"start": fragment.start + cut, "offset": fragment.offset + cut, "numel": right - left}
            found.append(Fragment(name=fragment.name, master=fragment.master, group=fragment.group, **places))
        position += fragment.numel
    return found


def copy_to_host(
    optimizer: torch.optim.Optimizer,
    fragments: Sequence[Fragment],
    rank: int,
    common: dict[str, Any] | None,
    weights: Weights | None,
) -> EngineState:
    """Masters, moments and steps of `fragments` as they are now."""
    total = sum(fragment.numel for fragment in fragments)
    tensors = {kind: torch.zeros(total, dtype=torch.float32) for kind in KINDS}
    pieces, position = [], 0
    for fragment in fragments:
        for kind, tensor in tensors.items():
            source = fragment.of(fragment.master) if kind == "master" else moment(optimizer, fragment, kind)
            if source is not None:
                tensor[position : position + fragment.numel].copy_(source)
        pieces.append((fragment.name, fragment.start, fragment.numel, step_of(optimizer, fragment)))
        position += fragment.numel
    return EngineState(rank=rank, tensors=tensors, pieces=pieces, common=common, weights=weights)


def describe_groups(groups: Sequence[Mapping[str, Any]], names: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """Hyper-parameters of each optimizer group, with its parameters' names; JSON-able."""
    return [
        {key: group[key] for key in HYPERPARAMETERS} | {"name": group["name"], "parameters": list(part)}
        for group, part in zip(groups, names, strict=True)
    ]


class SavedEngine:
    """What the `engine` folder of a checkpoint holds; a context manager, which keeps its files open.

    Raises:
        CheckpointError: files that are missing or cannot be read, or pieces that leave a gap or overlap.
    """

    def __init__(self, folder: Path):
        self.folder = folder / FOLDER
        self._files: dict[int, Any] = {}
        self._stack = ExitStack()
        self._pieces: dict[str, list[tuple[int, int, int, int, int]]] = defaultdict(list)
        """By name: (first element, end, step, rank, place in the rank's tensors), ordered."""
        try:
            self.common = json.loads((self.folder / COMMON).read_text(encoding="utf-8"))
            for rank in range(self.common["world_size"]):
                self._open(rank)
        except (OSError, ValueError, KeyError) as error:
            self._stack.close()
            raise CheckpointError(f"{self.folder}: cannot be read: {type(error).__name__}: {error}") from error
        self._require_whole()

    def __enter__(self) -> SavedEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._files.clear()

    def require_same_parameters(self, sizes: Mapping[str, int]) -> None:
        """Raises CheckpointError, with the differences, unless the trained parameters are those that were saved."""
        saved = self.common["parameters"]
        differences = [f"{name} is not in the checkpoint" for name in sorted(sizes.keys() - saved.keys())]
        differences += [f"{name} is not trained now" for name in sorted(saved.keys() - sizes.keys())]
        differences += [
            f"{name} has {sizes[name]} elements, {saved[name]} in the checkpoint"
            for name in sorted(sizes.keys() & saved.keys())
            if sizes[name] != saved[name]
        ]
        if differences:
            shown = "; ".join(differences[:5]) + (f"; and {len(differences) - 5} more" if len(differences) > 5 else "")
            raise CheckpointError(f"{self.folder} is of other trained parameters: {shown}")

    def restore(self, optimizer: torch.optim.Optimizer, fragments: Sequence[Fragment]) -> None:
        """Fill masters, moments and steps of `fragments`. Raises CheckpointError where they cannot be joined."""
        steps: dict[int, tuple[int, str]] = {}
        for fragment in fragments:
            make_moments(optimizer, fragment)
            (step,) = {self._copy(fragment, kind, _target(optimizer, fragment, kind)) for kind in KINDS}
            before, name = steps.setdefault(id(fragment.master), (step, fragment.name))
            if before != step:
                raise CheckpointError(
                    f"{self.folder}: {name} was updated {before} times, {fragment.name} {step} times; this ZeRO stage "
                    f"keeps one count for both: resume under the stage that wrote it, ZeRO-{self.common['zero_stage']}"
                )
            set_step(optimizer, fragment, step)

    def restore_groups(self, groups: Sequence[dict[str, Any]], names: Sequence[Sequence[str]]) -> None:
        """Give each group the hyper-parameters that its parameters were saved with; groups may be cut otherwise."""
        saved = {name: group for group in self.common["groups"] for name in group["parameters"]}
        for group, part in zip(groups, names, strict=True):
            found = [{key: saved[name][key] for key in HYPERPARAMETERS} for name in part]
            if any(other != found[0] for other in found):
                raise CheckpointError(f"{self.folder}: group {group['name']!r} joins parameters of different rates")
            group.update(found[0] | {"betas": tuple(found[0]["betas"])})

    def _open(self, rank: int) -> None:
        file = self._stack.enter_context(safe_open(self.folder / file_name(rank), framework="pt"))
        self._files[rank] = {kind: file.get_slice(kind) for kind in KINDS}
        place = 0
        for name, start, numel, step in json.loads(file.metadata()["pieces"]):
            self._pieces[name].append((start, start + numel, step, rank, place))
            place += numel
        for kind, tensor in self._files[rank].items():
            if tensor.get_shape() != [place]:
                raise ValueError(f"{file_name(rank)}: {kind} is {tensor.get_shape()}, expected [{place}]")

    def _require_whole(self) -> None:
        sizes = self.common["parameters"]
        if unknown := self._pieces.keys() - sizes.keys():
            raise CheckpointError(f"{self.folder}: pieces of unknown parameters {sorted(unknown)[:5]}")
        for name, size in sizes.items():
            end = 0
            for first, last, *_ in [*sorted(self._pieces[name]), (size, size)]:
                if first != end:
                    what = f"misses elements {end} to {first}" if first > end else f"has element {first} twice"
                    raise CheckpointError(f"{self.folder}: {name} {what}")
                end = last
            self._pieces[name].sort()

    def _copy(self, fragment: Fragment, kind: str, target: Tensor) -> int:
        """Fill `target`, [numel]; returns the step of what was copied."""
        steps = set()
        for first, end, step, rank, place in self._pieces[fragment.name]:
            left, right = max(first, fragment.start), min(end, fragment.start + fragment.numel)
            if left < right:
                source = self._files[rank][kind][place + left - first : place + right - first]
                target[left - fragment.start : right - fragment.start].copy_(source)
                steps.add(step)
        if len(steps) != 1:
            raise CheckpointError(f"{self.folder}: {fragment.name} was updated {sorted(steps)} times in its parts")
        return steps.pop()


def _target(optimizer: torch.optim.Optimizer, fragment: Fragment, kind: str) -> Tensor:
    return fragment.of(fragment.master if kind == "master" else optimizer.state[fragment.master][kind])
