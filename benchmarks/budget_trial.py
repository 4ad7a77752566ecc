"""One trial of `benchmarks.budget`, in a process of its own: worst-case steps under a memory limit, then real ones.

python -m benchmarks.budget_trial '{"folder": ...}' result.json      (fields: `Trial`)
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks import mixes
from benchmarks.environment import write_json
from benchmarks.memory import Gauge
from benchmarks.throughput_contenders import Product, Setting
from fvlm.config import RunConfig
from fvlm.data.capacities import Capacities
from fvlm.train import objectives, schedule
from fvlm.train.build import TrainingData, load_data
from fvlm.train.engine import start_ranks, stop_ranks
from fvlm.train.gpus import GIB
from fvlm.train.preflight import worst_case_pack
from fvlm.train_config import CheckpointingConfig

OUT_OF_MEMORY = re.compile("out of memory|not enough memory|ALLOC_FAILED")
"""What libraries below torch's allocator say of it."""
WARM_UP = 2
WORST_STEPS = 2
"""The second finds gradients, moments and buffers in their places."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What to try."""

    folder: str
    """Drawn samples and weights (`benchmarks.mixes`)."""
    model: str
    mix: str
    zero: str
    checkpointing: CheckpointingConfig
    tokens: int
    packs: int
    """Of a real step."""
    limit: float
    """GiB."""
    steps: int
    """Real steps that are timed."""
    overrides: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Trial:
        """From JSON."""
        fields = json.loads(text)
        fields |= {"checkpointing": CheckpointingConfig(**fields["checkpointing"])}
        return cls(**fields | {"overrides": tuple(fields["overrides"])})


class Drawn(NamedTuple):
    """What `Product` reads of a `benchmarks.mixes.Workload`, of one that was drawn before."""

    folder: Path
    config: RunConfig
    data: TrainingData


def run(trial: Trial) -> dict[str, Any]:
    """Whether it fits, its capacities, its peak and its speed. Raises what running out of memory raises."""
    world = start_ranks()
    on_gpu = world.device.type == "cuda"
    if on_gpu:
        share = trial.limit * GIB / torch.cuda.get_device_properties(world.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, share), world.device)
    config = mixes.run_config(Path(trial.folder), trial.model, trial.mix, _overrides(trial))
    data = load_data(config)
    setting = Setting(zero=trial.zero, train={"activation_checkpointing": trial.checkpointing})
    reference = np.zeros((len(data.table), 2), np.float32) if trial.mix == "dpo" else None
    product = Product(Drawn(Path(trial.folder), config, data), setting, world, reference)
    capacities = data.plan.capacities
    gauge = Gauge(world.device)
    gauge.count_what_is_there(product.engine.module)
    gauge.start()
    _worst_case(product, capacities, gauge)
    peak = gauge.read()["peak"]
    if not on_gpu and peak > trial.limit * GIB:  # on a GPU the allocator itself refuses
        raise MemoryError(f"{peak / GIB:.3f} GiB were alive at once")
    found = {"fits": True, "capacities": asdict(capacities), "peak_gib": peak / GIB, **_speed(product, trial.steps)}
    if on_gpu:
        found["peak_gib"] = torch.cuda.max_memory_allocated(world.device) / GIB
    product.close()
    stop_ranks()
    return found


def _overrides(trial: Trial) -> list[str]:
    given = [*trial.overrides, f"data.tokens={trial.tokens}", f"train.packs_per_step={trial.packs}"]
    config = mixes.run_config(Path(trial.folder), trial.model, trial.mix, given)
    return [*given, f"data.longest={min(config.data.longest or trial.tokens, trial.tokens)}"]


def _worst_case(product: Product, capacities: Capacities, gauge: Gauge) -> None:
    """Whole steps of the largest pack, each left out in the end, so that the weights stay as they are."""
    engine, train = product.engine, product.config.train
    arguments = objectives.call_arguments(train, max(train.fine_iterations))
    batch = worst_case_pack(engine.module.config, capacities)
    if train.objective == "dpo":
        batch.reference_logprob = torch.zeros(len(batch.source_id))
    rates = schedule.learning_rates(train, 0.0)
    with gauge.live, engine.rehearsal():
        batch = batch.to(engine.world.device)
        for _ in range(WORST_STEPS):
            for _ in range(engine.accumulation):
                out = engine.forward(batch=batch, **arguments)
                engine.backward(objectives.loss_sum(out, batch, train)[0], max(1, int(out.num_labels)))
                del out
            engine.step(rates, lambda norm: torch.ones_like(norm, dtype=torch.float32))


def _speed(product: Product, steps: int) -> dict[str, float]:
    for _ in range(WARM_UP):
        product.step()
    product.finish()
    _wait(product)
    begin, samples = time.perf_counter(), 0
    for _ in range(steps):
        product.step()
        samples += product.loaded.step.samples
    product.finish()
    _wait(product)
    seconds = time.perf_counter() - begin
    return {"samples_per_second": samples / seconds, "step_seconds": seconds / steps}


def _wait(product: Product) -> None:
    if product.engine.world.device.type == "cuda":
        torch.cuda.synchronize()


def main() -> int:
    """Try, and write what was found; running out of memory is a finding."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.disable(logging.WARNING)
    trial = Trial.parse(sys.argv[1])
    try:
        found = run(trial)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and not OUT_OF_MEMORY.search(str(error)):
            raise
        found = {"fits": False, "reason": f"out of memory: {str(error).splitlines()[0]}"}
    write_json(Path(sys.argv[2]), found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
