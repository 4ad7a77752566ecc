"""Real gloo ranks on this machine: what each ZeRO stage sends, how fast collectives are, how long a step takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from benchmarks.scaling_model import Link
from fvlm.config import load_config
from fvlm.data.capacities import Capacities
from fvlm.model import FoveatedConfig, build_model, tiny_config
from fvlm.train.dry_run import meta_model
from fvlm.train.engine import Engine, World
from fvlm.train.memory import Parameters, count_parameters
from fvlm.train.preflight import worst_case_pack
from fvlm.train.traffic import PASSES
from fvlm.train.zero_config import read_zero_json

CALLS = {
    "all_reduce": ("all_reduce", 0),
    "reduce_scatter_tensor": ("reduce_scatter", 1),
    "all_gather_into_tensor": ("all_gather", 0),
    "reduce": ("reduce", 0),
    "broadcast": ("broadcast", 0),
}
"""Function of torch.distributed → its collective, and which argument holds the whole tensor."""
LISTED = ("reduce_scatter", "all_gather", "all_to_all", "all_to_all_single")
"""Functions that DeepSpeed is not seen to call: one that does is an error, or it would go uncounted."""
CALLED: list[tuple[str, int]] = []
"""(collective, bytes of the whole tensor) of this process's calls since `count_collectives`."""
SMALL = 64  # bytes; norms and flags are below
SIZES = (1 << 12, 1 << 16, 1 << 20, 1 << 22, 1 << 24, 1 << 26)
RATES = {"connector": 1e-6, "dino": 1e-6, "llm": 1e-6}
CAPACITIES = Capacities(frames=4, tokens=64, visual=8, coarse=16, samples=4, labels=24, max_seqlen=16)
TIMED = Capacities(frames=16, tokens=512, visual=32, coarse=64, samples=16, labels=200, max_seqlen=64)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A step to take: with which DeepSpeed JSON, in which precision, of how many packs a rank."""

    zero: str
    dtype: str = "fp32"
    packs: int = 1
    changes: tuple[tuple[str, Any], ...] = ()
    """Of the JSON's section `zero_optimization`."""


def count_collectives() -> None:
    """From here on, every collective of this process is appended to `CALLED`. DeepSpeed keeps references of its own to
    torch's functions, so this has to come before the engine's first call."""
    before = {name: getattr(dist, name) for name in CALLS}

    def counting(name: str) -> Callable:
        collective, place = CALLS[name]

        def call(*args: Any, **kwargs: Any) -> Any:
            tensor = args[place] if len(args) > place else list(kwargs.values())[place - len(args)]
            CALLED.append((collective, tensor.numel() * tensor.element_size()))
            return before[name](*args, **kwargs)

        return call

    def unexpected(name: str) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError(f"torch.distributed.{name}: the count knows no such call; see CALLS")

        return call

    for name in CALLS:
        setattr(dist, name, counting(name))
    for name in LISTED:
        setattr(dist, name, unexpected(name))


def geometry() -> FoveatedConfig:
    """Of the model that all steps here are of."""
    return tiny_config(vocab_size=512)


def model_parameters() -> Parameters:
    """Its numbers of parameters."""
    return count_parameters(meta_model(geometry(), torch.float32))


def engine_for(world: World, case: Case) -> Engine:
    """A tiny model under DeepSpeed."""
    train = load_config("tiny_test").train
    train = replace(train, packs_per_step=case.packs * world.size, dtype=case.dtype, activation_checkpointing=False)
    zero, origin = read_zero_json(case.zero)
    zero["zero_optimization"].update(dict(case.changes))
    torch.manual_seed(0)
    return Engine(build_model(geometry()).train(), train, zero, origin, world)


def count(world: World, cases: list[Case]) -> list[dict[str, int]]:
    """Bytes by collective of each case's third step; the first two are when ZeRO-3 learns the model's order."""
    batch = worst_case_pack(geometry(), CAPACITIES)
    found = []
    for case in tqdm(cases, "steps", disable=not world.is_main):
        engine = engine_for(world, case)
        for _ in range(3):
            CALLED.clear()
            take_step(engine, batch)
        sizes = dict.fromkeys(dict(CALLS.values()), 0)
        for collective, size in CALLED:
            sizes[collective] += size if size >= SMALL else 0
        found.append({collective: size for collective, size in sizes.items() if size})
    return found


def take_step(engine: Engine, batch: Any) -> list[float]:
    """One optimizer step; seconds of each micro-batch, the last one with what follows it."""
    seconds = []
    for number in range(engine.accumulation):
        start = time.perf_counter()
        out = engine.forward(batch=batch)
        engine.backward(out.loss_sum, engine.accumulation * engine.world.size * int(out.num_labels))
        if number + 1 == engine.accumulation:
            engine.step(RATES)
        seconds.append(time.perf_counter() - start)
    return seconds


def time_collectives(world: World, repeats: int) -> dict[str, dict[int, float]]:
    """Collective → bytes of the whole tensor → median seconds."""
    found: dict[str, dict[int, float]] = {name: {} for name in PASSES}
    for size in SIZES:
        whole = torch.zeros(size // 4)
        share = torch.zeros(size // 4 // world.size)
        calls = {
            "all_reduce": lambda whole=whole: dist.all_reduce(whole),
            "reduce_scatter": lambda whole=whole, share=share: dist.reduce_scatter_tensor(share, whole),
            "all_gather": lambda whole=whole, share=share: dist.all_gather_into_tensor(whole, share),
        }
        for name, call in calls.items():
            taken = []
            for _ in range(repeats + 2):
                dist.barrier()
                start = time.perf_counter()
                call()
                taken.append(time.perf_counter() - start)
            found[name][size] = statistics.median(taken[2:])
    return found


def fit_link(collective: str, seconds: dict[int, float], ranks: int) -> Link:
    """The line through measured times, seconds = call + bytes that pass a link / rate, in least relative squares.

    Hops and calls cannot be told apart on one number of ranks: all latency is the call's.
    """
    passed = np.array([PASSES[collective] * (ranks - 1) / ranks * size for size in seconds])
    taken = np.array(list(seconds.values()))
    columns = np.stack([np.ones_like(passed), passed], axis=1) / taken[:, None]
    (call, per_byte), *_ = np.linalg.lstsq(columns, np.ones(len(taken)), rcond=None)
    return Link(rate=float(1 / per_byte), hop=0.0, call=float(max(call, 0.0)))


def time_steps(world: World, cases: list[Case], repeats: int) -> list[dict[str, float]]:
    """Medians for each case: seconds of a step, and of the micro-batches before its last one."""
    batch = worst_case_pack(geometry(), TIMED)
    found = []
    for case in tqdm(cases, "steps", disable=not world.is_main):
        engine = engine_for(world, case)
        for _ in range(3):
            take_step(engine, batch)
        steps = []
        for _ in range(repeats):
            world.barrier()
            steps.append(take_step(engine, batch))
        before = [seconds for step in steps for seconds in step[:-1]]
        found.append(
            {
                "step": statistics.median(map(sum, steps)),
                "last": statistics.median(step[-1] for step in steps),
                "micro_batch": statistics.median(before) if before else float("nan"),
            }
        )
    return found
