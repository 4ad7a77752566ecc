"""What the product's steady steps do beside computing: compile, make the host wait, launch; and how full packs are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from benchmarks.counters import SteadyState
from benchmarks.mixes import Workload
from benchmarks.throughput_contenders import Product
from fvlm.data.plan import Step
from fvlm.data.table import DIMENSIONS


def count(product: Product, num_steps: int) -> tuple[dict[str, Any], dict[str, dict[str, int]]]:
    """(figures per step, where the host waited) of `num_steps` further steps, which nobody times.

    Loading is counted where the training process only fetches what others loaded, and copies it.
    """
    in_process, found = product.config.data.num_workers == 0, []
    product.finish()
    for _ in range(num_steps):
        if in_process:
            product.load()
        with SteadyState(product.engine.world.device) as steady:
            if not in_process:
                product.load()
            product.train()
        found.append(steady)
    product.finish()
    ours = dict(sum((Counter(each.host_syncs.ours) for each in found), Counter()))
    engine = dict(sum((Counter(each.host_syncs.engine) for each in found), Counter()))
    launches = [each.launches for each in found]
    figures = {
        "recompilations": sum(each.recompilations for each in found),
        "host_syncs_ours_per_step": sum(ours.values()) / num_steps,
        "host_syncs_engine_per_step": sum(engine.values()) / num_steps,
        "launches_per_step": None if None in launches else sum(launches) / num_steps,
    }
    return {f"product/{name}": value for name, value in figures.items()}, {"ours": ours, "engine": engine}


def padding_in_attention(product: Product) -> int:
    """Rows of the last step's packs that attention covers and that are no sample's; both passes."""
    packs = product.loaded.step.packs
    covered = sum(int(batch.cu_seqlens[-1] + batch.coarse_cu_seqlens[-1]) for batch in product.loaded.batches)
    return covered - sum(pack.tokens + pack.coarse for pack in packs)


def fill(workload: Workload, steps: Sequence[Step]) -> dict[str, float]:
    """Share in use of what the steps' packs have room for, by dimension."""
    packs = [pack for step in steps for pack in step.packs]
    room = dict(zip(DIMENSIONS, workload.data.plan.capacities.as_array().tolist(), strict=True))
    return {
        f"product/fill_{name}": sum(getattr(pack, name) for pack in packs) / (len(packs) * room[name])
        for name in DIMENSIONS
    }
