"""The only file that imports DeepSpeed: ranks, the engine around the model, its checkpoints, the few collectives."""

from __future__ import annotations

import math
import os
import socket
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fvlm.config import TrainConfig
from fvlm.schema import ConfigError
from fvlm.train.optimizer import build_adamw, set_rates
from fvlm.train.zero_config import accumulation, fill, resolve_dtype, zero_stage

TAG = "engine"


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among the ranks of a run."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Rank 0 writes, prints and decides."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()

    def sum(self, values: Tensor) -> Tensor:
        """Sum over ranks, in place, on every rank."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's picklable value, on every rank."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's picklable value, in rank order, on every rank."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values


def world_from_environment() -> World:
    """What the launcher said, without starting anything; one rank where nobody said anything."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    on_gpu = torch.cuda.is_available()
    return World(
        rank=rank,
        size=size,
        local_rank=local_rank,
        device=torch.device("cuda", local_rank) if on_gpu else torch.device("cpu"),
    )


def start_ranks() -> World:
    """Join the ranks of a `deepspeed` or `torchrun` launch, or be the only one of a plain `python` start."""
    world = world_from_environment()
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns that it found no GPU
        if world.size > 1 and "OMP_NUM_THREADS" not in os.environ:
            local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", world.size)))
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_ranks))
    defaults = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1"}
    for key, value in defaults.items():
        os.environ.setdefault(key, str(value))
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(_free_port())

    warnings.filterwarnings(
        "ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning
    )  # DeepSpeed's own calls
    import deepspeed

    # Gloo serves CPU ranks; DeepSpeed's shared-memory operator would need a compiler and 45 s on first use.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    return world


def stop_ranks() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


class Engine:
    """A model under DeepSpeed: forward, backward, step, and its share of a checkpoint.

    Args:
        model: frozen parameters already marked; moved to the device and cast here.
        train: the run's training section.
        zero: contents of a DeepSpeed JSON, and `origin` its name for messages.

    Raises:
        ConfigError: the JSON contradicts the run, or DeepSpeed refuses it.
    """

    def __init__(self, model: nn.Module, train: TrainConfig, zero: Mapping[str, Any], origin: str, world: World):
        import deepspeed

        self.world = world
        self.dtype = resolve_dtype(train, world.device.type == "cuda")
        self.stage = zero_stage(zero)
        self.accumulation = accumulation(train, world.size)
        filled = fill(zero, origin, train, world.size, self.dtype)
        model.to(world.device)
        if train.activation_checkpointing:
            model.gradient_checkpointing_enable()
        try:
            self._engine, *_ = deepspeed.initialize(model=model, optimizer=build_adamw(model, train), config=filled)
        except (deepspeed.DeepSpeedConfigError, ValueError, AssertionError) as error:
            raise ConfigError(f"{origin}: refused by DeepSpeed: {error}") from error
        self._micro_batches = 0
        self._assert_fp32_masters()

    @property
    def module(self) -> nn.Module:
        """The model itself, for evaluation and saving."""
        return self._engine.module

    @property
    def skipped_steps(self) -> int:
        """Optimizer steps that DeepSpeed skipped because a gradient was not finite."""
        return self._engine.skipped_steps

    def forward(self, **kwargs: Any) -> Any:
        """The model's output for one micro-batch, ready for `backward`."""
        return self._engine(**kwargs)

    def backward(self, loss_sum: Tensor, planned: int) -> None:
        """Accumulate the gradient of `loss_sum / planned`, the step's planned number of loss tokens over all ranks.

        DeepSpeed averages over ranks and micro-batches; the factor undoes both, so that the step's gradient is that of
        one sum divided once.
        """
        self._engine.backward(loss_sum * (self.world.size * self.accumulation / planned))
        self._micro_batches += 1
        if self._micro_batches < self.accumulation:
            self._engine.step()  # counts the micro-batch; DeepSpeed updates the weights at the last one only

    def step(self, rates: Mapping[str, float]) -> float:
        """Update the weights at the given rate of each group.

        Returns the norm of the step's whole gradient before clipping. Where that is not finite, nothing was updated.
        """
        if self._micro_batches != self.accumulation:
            raise RuntimeError(f"step after {self._micro_batches} micro-batches: expected {self.accumulation}")
        self._micro_batches = 0
        set_rates(self._engine.basic_optimizer.param_groups, rates)
        if not self._is_plain:
            self._engine.step()
            return float(self._engine.get_global_grad_norm())
        norm = float(self._plain_gradient_norm())
        if math.isfinite(norm):
            self._engine.step()
        return norm

    def save(self, folder: Path) -> None:
        """Write DeepSpeed's state of all ranks below `folder`; collective."""
        self._engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote, on the same number of ranks and the same ZeRO stage; collective."""
        path, _ = self._engine.load_checkpoint(str(folder), tag=TAG, load_lr_scheduler_states=False)
        if path is None:
            raise RuntimeError(f"{folder}: DeepSpeed found no checkpoint {TAG!r} in it")

    def write_weights(self, folder: Path) -> None:
        """`save_pretrained` from rank 0, with parameters gathered under ZeRO-3; collective."""
        import deepspeed

        parameters = list(self.module.parameters()) if self.stage == 3 else []
        with deepspeed.zero.GatheredParameters(parameters, enabled=self.stage == 3):
            if self.world.is_main:
                self.module.save_pretrained(folder)
        self.world.barrier()

    @property
    def _is_plain(self) -> bool:
        """ZeRO-0 in fp32: torch's optimizer itself, and DeepSpeed reports no norm."""
        return self.stage == 0 and self.dtype == "fp32"

    def _plain_gradient_norm(self) -> Tensor:
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    def _assert_fp32_masters(self) -> None:
        optimizer = self._engine.optimizer
        masters = getattr(optimizer, "fp32_partitioned_groups_flat", None)  # ZeRO-3
        if masters is None:
            masters = [p for group in self._engine.basic_optimizer.param_groups for p in group["params"]]
        wrong = {str(p.dtype) for p in masters if p.dtype != torch.float32}
        if wrong or not masters:
            raise RuntimeError(
                f"master weights are {sorted(wrong) or 'missing'}: expected torch.float32; check the ZeRO JSON"
            )


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
