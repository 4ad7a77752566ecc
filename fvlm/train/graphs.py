"""A micro-batch's forward and backward pass as two CUDA graphs: recorded once, replayed for every pack of its shape.

Parameters get their gradients from autograd as ever, after the graph, so that the engine's hooks see them one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from fvlm.model.base import VLMOutput
from fvlm.model.packed import PackedBatch
from fvlm.schema import ConfigError
from fvlm.train_config import TrainConfig

Replay = Callable[[], None]
Record = Callable[[Callable[[], None]], Replay]
"""Runs a function once, and gives what does its device work again."""

WARM_UP = 3
_OUTPUTS = ("loss_sum", "logprobs", "num_labels", "coarse_loss_sum", "coarse_logprobs")


def require_graphs(train: TrainConfig, stage: int, origin: str, device: torch.device) -> None:
    """Raises ConfigError where a run's passes cannot be recorded."""
    key = "train.cuda_graphs = true"
    if device.type != "cuda":
        raise ConfigError(f"{key}: this run is on {device.type}; expected a GPU, or train.cuda_graphs=false")
    if stage == 3:
        raise ConfigError(f"{key}: {origin} asks for ZeRO-3, which moves parameters in memory; use ZeRO-2 or less")
    if train.activation_checkpointing:
        raise ConfigError(
            f"{key}: train.activation_checkpointing reads random states on the host, which cannot be recorded; "
            f"use one or the other"
        )


def graphed(model: nn.Module, device: torch.device) -> None:
    """Let training passes over packs be replayed from graphs, one pair for each set of the call's arguments.

    Evaluation, and whatever runs without gradients, stays as it was. A replayed output is valid until the next pass;
    each forward pass wants its backward pass before the next one.
    """
    eager, passes, record = model.forward, {}, recorder(device)

    def forward(*args: Any, batch: PackedBatch | None = None, **arguments: Any) -> VLMOutput:
        if args or batch is None or not (model.training and torch.is_grad_enabled()):
            return eager(*args, batch=batch, **arguments)
        key = tuple(sorted(arguments.items()))
        if key not in passes:
            passes[key] = GraphedPass(lambda pack: eager(batch=pack, **arguments), model, batch, record)
        return passes[key](batch)

    model.forward = forward


def recorder(device: torch.device) -> Record:
    """Captures CUDA graphs that share one pool of memory; what they hold is not given back."""
    pool = torch.cuda.graph_pool_handle()

    def record(function: Callable[[], None]) -> Replay:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(device)
        with torch.cuda.graph(graph, pool=pool):
            function()
        return graph.replay

    return record


class GraphedPass:
    """One recorded pair of passes.

    Args:
        run: the forward pass of a pack.
        model: whose parameters get gradients; they have to stay where they are in memory.
        batch: a pack of the shape of all that will come.
        record: what makes a replay of a function.
    """

    def __init__(self, run: Callable[[PackedBatch], VLMOutput], model: nn.Module, batch: PackedBatch, record: Record):
        self._run = run
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._addresses = self._where()
        self._batch = replace(batch, **{name: x.clone() for name, x in _tensors(batch).items()})
        self._warm_up(batch.frames.device)
        self._replay_forward = record(self._forward)
        self._upstream = [torch.zeros_like(x) for x in self._differentiable()]
        self._replay_backward = record(self._backward)

    def __call__(self, batch: PackedBatch) -> VLMOutput:
        """The pass over another pack. Raises RuntimeError where shapes or parameters are not those recorded."""
        if self._where() != self._addresses:
            raise RuntimeError("train.cuda_graphs: parameters have moved in memory since the graphs were recorded")
        own, new = _tensors(self._batch), _tensors(batch)
        if own.keys() != new.keys() or any(own[name].shape != new[name].shape for name in own):
            raise RuntimeError("train.cuda_graphs: a pack of another shape than the one that was recorded")
        for name, x in new.items():
            own[name].copy_(x, non_blocking=True)
        outputs = _Replayed.apply(self, *self._parameters)
        return VLMOutput(**dict(zip(self._names, outputs, strict=True)))

    def _where(self) -> list[int]:
        return [p.data_ptr() for p in self._parameters]

    def _warm_up(self, device: torch.device) -> None:
        """What happens once only, such as compiling and choosing algorithms, must not be recorded."""
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        with torch.cuda.stream(stream):
            if stream is not None:
                stream.wait_stream(torch.cuda.default_stream(device))
            for _ in range(WARM_UP):
                self._forward()
                self._upstream = [torch.zeros_like(x) for x in self._differentiable()]
                self._backward()
        if stream is not None:
            torch.cuda.current_stream(device).wait_stream(stream)

    def _forward(self) -> None:
        with torch.enable_grad():
            out = self._run(self._batch)
        self._names = [name for name in _OUTPUTS if out.get(name) is not None]
        self._outputs = [out[name] for name in self._names]

    def _backward(self) -> None:
        self._gradients = torch.autograd.grad(
            self._differentiable(), self._parameters, self._upstream, allow_unused=True
        )

    def _differentiable(self) -> list[Tensor]:
        return [x for x in self._outputs if x.requires_grad]


class _Replayed(torch.autograd.Function):
    """Outputs and gradients leave as copies: the next replay writes into the recorded ones."""

    @staticmethod
    def forward(ctx, graph: GraphedPass, *parameters: Tensor):
        graph._replay_forward()
        outputs = tuple(x.detach().clone() for x in graph._outputs)
        ctx.graph, ctx.takes_gradient = graph, [x.requires_grad for x in graph._outputs]
        ctx.mark_non_differentiable(*(x for x, takes in zip(outputs, ctx.takes_gradient, strict=True) if not takes))
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *upstream: Tensor):
        given = [x for x, takes in zip(upstream, ctx.takes_gradient, strict=True) if takes]
        for own, new in zip(ctx.graph._upstream, given, strict=True):
            own.copy_(new)
        ctx.graph._replay_backward()
        return None, *(None if x is None else x.clone() for x in ctx.graph._gradients)


def _tensors(batch: PackedBatch) -> dict[str, Tensor]:
    named = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return {name: x for name, x in named.items() if isinstance(x, Tensor)}
