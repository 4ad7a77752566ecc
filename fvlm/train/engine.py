"""The only file that imports DeepSpeed: ranks, the engine around the model, its checkpoints, the few collectives."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fvlm.schema import ConfigError
from fvlm.train import fragments, graphs, reshape
from fvlm.train.guard import not_finite
from fvlm.train.optimizer import (
    LLM_BOTTOM,
    build_adamw,
    build_apex_adamw,
    hyperparameters,
    judge_before_update,
    parameter_groups,
    parts,
    pass_over,
    set_rates,
)
from fvlm.train.zero_config import accumulation, fill, resolve_dtype, zero_stage
from fvlm.train_config import TrainConfig

logger = logging.getLogger(__name__)

COUNTERS = ("global_steps", "global_samples", "skipped_steps")
"""DeepSpeed's own, kept over a restart."""


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
        os.environ["MASTER_PORT"] = "0"  # of a single rank: whichever is free

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
        ConfigError: the JSON contradicts the run, DeepSpeed refuses it, masters or moments would not be fp32, or the
            optimizer cannot be built here.
    """

    def __init__(self, model: nn.Module, train: TrainConfig, zero: Mapping[str, Any], origin: str, world: World):
        import deepspeed

        self.world = world
        self.dtype = resolve_dtype(train, world.device.type == "cuda")
        self.stage = zero_stage(zero, self.dtype)
        self.accumulation = accumulation(train, world.size)
        filled = fill(zero, origin, train, world.size, self.dtype)
        model.to(world.device)
        if train.activation_checkpointing:
            model.gradient_checkpointing_enable(encoder=train.checkpointing.encoder, llm=train.checkpointing.llm)
        if train.compile:
            if self.stage == 3:
                raise ConfigError(
                    f"train.compile = true: {origin} asks for ZeRO-3, whose hooks inside of blocks cannot be compiled; "
                    f"use ZeRO-2 or less, or train.compile=false"
                )
            model.compile_blocks()
        if train.cuda_graphs:
            graphs.require_graphs(train, self.stage, origin, world.device)
        try:
            optimizer = _optimizer(model, train)
            self._named = _named_groups(model, optimizer)  # DeepSpeed puts tensors of its own into the groups
            self._sizes = {name: p.numel() for part in self._named for name, p in part}
            self._engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=filled)
        except (deepspeed.DeepSpeedConfigError, ValueError, AssertionError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{origin}: refused by DeepSpeed: {error}") from error
        if train.cuda_graphs:
            graphs.graphed(model, world.device)
        if self.stage != zero_stage(zero) and world.is_main:
            logger.info("%s in bf16 runs as ZeRO-1: DeepSpeed's ZeRO-0 would sum gradients in bf16", origin)
        self._micro_batches = 0
        self._lora_scaling = train.lora.alpha / train.lora.rank if train.lora is not None else 1.0
        self._parts = parts(model, train.llm_bottom)
        self._frozen: set[str] = set()
        self._frozen_now: frozenset[str] = frozenset()
        self._hooks: list[Any] = []
        self._verdict, self._judged = not_finite, None
        self.judged_on = judge_before_update(self._engine.basic_optimizer, self._judge)
        """Where a step that must not count is left out: `device` or `host` (docs/training.md)."""
        pass_over(self._engine.basic_optimizer, lambda: self._all_frozen)
        self._require_fp32(origin)

    def close(self) -> None:
        """Let go of weights and states, which hooks of autograd hold in cycles that no garbage collector sees.

        For processes that build several engines. After ZeRO-3 DeepSpeed keeps the model all the same.
        """
        self._engine.destroy()

    @property
    def module(self) -> nn.Module:
        """The model itself, for evaluation and saving."""
        return self._engine.module

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

    def step(self, rates: Mapping[str, float], verdict: Callable[[Tensor], Tensor] = not_finite) -> Tensor:
        """Update the weights at the given rate of each group, unless the step must not count.

        `verdict` takes the norm of the step's whole gradient before clipping, a scalar, and gives another on the
        device: 1 for a step that leaves weights, moments and decay as they are, bit for bit (`skipped`). Returns the
        norm; nothing of ours waits for the device (docs/training.md says what DeepSpeed and some optimizers do).
        """
        if self._micro_batches != self.accumulation:
            raise RuntimeError(f"step after {self._micro_batches} micro-batches: expected {self.accumulation}")
        self._micro_batches = 0
        set_rates(self._engine.basic_optimizer.param_groups, rates, self._all_frozen)
        self._verdict, self._judged = verdict, None
        self._norm = self._plain_gradient_norm() if self.stage == 0 else None
        self._engine.step()
        self._judge()  # where DeepSpeed itself left the update out, nobody has asked
        return self._norm

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Whole steps within, each with a verdict of 1, leave DeepSpeed's counters as they were, too."""
        before = {counter: getattr(self._engine, counter) for counter in (*COUNTERS, "micro_steps")}
        yield
        for counter, value in before.items():
            setattr(self._engine, counter, value)

    @property
    def skipped(self) -> Tensor:
        """The last step's verdict, float32 scalar: 1 where it did not count."""
        return self._judged

    def freeze(self, part: str) -> None:
        """Exclude a part (`fvlm.train.optimizer.parts`) from every update from now on.

        Its gradients count as zero, also in the norm, and the optimizer passes over it: weights, moments and counter
        stay as they are, bit for bit. Work and memory stay too, since DeepSpeed has laid out its buffers.
        """
        self._frozen.add(part)
        self._silence()

    def freeze_for_now(self, parts_frozen: frozenset[str]) -> None:
        """Exclude exactly these parts, and those of `freeze`, until the next call; for before a step's first pass."""
        if parts_frozen != self._frozen_now:
            self._frozen_now = parts_frozen
            self._silence()

    @property
    def _all_frozen(self) -> set[str]:
        frozen = self._frozen | self._frozen_now
        return frozen | {LLM_BOTTOM} if "llm" in frozen else frozen

    def _silence(self) -> None:
        """Make the gradients of what is frozen zero, and no others."""
        for hook in self._hooks:
            hook.remove()
        found = [p for part in self._all_frozen for _, p in self._parts.get(part, ()) if p.requires_grad]
        self._hooks = [parameter.register_hook(torch.zeros_like) for parameter in found]

    def snapshot(self) -> reshape.EngineState:
        """A copy, on the host, of this rank's share of a checkpoint; rank 0's has the whole weights; collective."""
        found, optimizer = self._fragments(), self._engine.basic_optimizer
        if self.stage == 0:  # every rank keeps everything
            found = reshape.share(found, self.world.rank, self.world.size)
        common = self._common() if self.world.is_main else None
        return reshape.copy_to_host(optimizer, found, self.world.rank, common, self._copy_weights())

    def load(self, folder: Path) -> None:
        """Restore what a snapshot, written below `folder`, holds, whatever ranks and ZeRO stage it is of; collective.

        Weights of parameters that are not trained are not part of it: they are those that the model was built with.
        Raises reshape.CheckpointError where it is of other parameters, or not whole.
        """
        optimizer = self._engine.basic_optimizer
        with reshape.SavedEngine(folder) as saved:
            saved.require_same_parameters(self._sizes)
            saved.restore(optimizer, self._fragments())
            saved.restore_groups(optimizer.param_groups, self._names)
        fragments.refresh(self._engine.optimizer)
        for counter in COUNTERS:
            setattr(self._engine, counter, saved.common[counter])
        self._engine.micro_steps = self._engine.global_steps * self.accumulation
        self._micro_batches = 0

    @property
    def _names(self) -> list[list[str]]:
        return [[name for name, _ in part] for part in self._named]

    def _fragments(self) -> list[fragments.Fragment]:
        groups = self._engine.basic_optimizer.param_groups
        return fragments.locate(self._engine.optimizer, groups, self._named, self.world.rank)

    def _common(self) -> dict[str, Any]:
        return {
            "world_size": self.world.size,
            "zero_stage": self.stage,
            "dtype": self.dtype,
            **{counter: getattr(self._engine, counter) for counter in COUNTERS},
            "groups": reshape.describe_groups(self._engine.basic_optimizer.param_groups, self._names),
            "parameters": self._sizes,
        }

    def _copy_weights(self) -> reshape.Weights | None:
        """The whole model's, gathered under ZeRO-3, on rank 0; None on the others."""
        import deepspeed

        parameters = list(self.module.parameters()) if self.stage == 3 else []
        with deepspeed.zero.GatheredParameters(parameters, enabled=self.stage == 3):
            return reshape.Weights.of(self.module, self._lora_scaling) if self.world.is_main else None

    def _judge(self) -> Tensor:
        """The verdict on the step that is being made, asked for once."""
        if self._judged is None:
            norm = self._engine.optimizer._global_grad_norm if self._norm is None else self._norm
            if not isinstance(norm, Tensor):  # a number that DeepSpeed has read already; `full` makes no copy
                norm = torch.full((), norm, device=self.world.device)
            self._norm = norm.detach()
            self._judged = self._verdict(self._norm).float()
        return self._judged

    def _plain_gradient_norm(self) -> Tensor:
        """ZeRO-0 is torch's optimizer itself, and DeepSpeed knows no norm."""
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    def _require_fp32(self, origin: str) -> None:
        basic = self._engine.basic_optimizer
        masters = getattr(self._engine.optimizer, "fp32_partitioned_groups_flat", None)  # ZeRO-3
        if masters is None:
            masters = [p for group in basic.param_groups for p in group["params"]]
        moments = [t for state in basic.state.values() for t in state.values() if torch.is_tensor(t) and t.ndim]
        for what, tensors in (("master weights", masters), ("moments", moments)):
            wrong = sorted({str(t.dtype) for t in tensors if t.dtype != torch.float32})
            if wrong or not masters:
                raise ConfigError(
                    f"{origin}: {what} would be {wrong or 'missing'}: expected torch.float32; remove what asks for "
                    f"another type"
                )


def _optimizer(model: nn.Module, train: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer that `train.optimizer` names; raises ConfigError, saying what is missing, where it cannot be."""
    if train.optimizer == "adamw":
        return build_adamw(model, train)
    if train.optimizer == "apex_fused":
        return build_apex_adamw(model, train)
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    groups, shared = parameter_groups(model, train), hyperparameters(train)
    try:
        if train.optimizer == "deepspeed_cpu":
            return DeepSpeedCPUAdam(groups, adamw_mode=True, fp32_optimizer_states=True, **shared)
        return FusedAdam(groups, adam_w_mode=True, **shared)
    except Exception as error:  # whatever DeepSpeed's builder, the compiler or the loader raise
        raise ConfigError(
            f"train.optimizer = {train.optimizer}: DeepSpeed cannot build it here ({type(error).__name__}: {error}); "
            f"it is compiled on first use, which needs a C++ compiler, and CUDA's nvcc for the GPU; or choose adamw"
        ) from error


def _named_groups(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[tuple[str, nn.Parameter]]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[(names[id(p)], p) for p in group["params"]] for group in optimizer.param_groups]
