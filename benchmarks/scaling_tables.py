"""The tables and the plot of docs/scaling.md."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.environment import markdown_table
from benchmarks.plan_index import STAGE_2, draw_index
from benchmarks.scaling_model import (
    Cluster,
    Run,
    network,
    nvlink,
    packs_for,
    pcie,
    samples_of_pack,
    simulate,
    work,
)
from fvlm.data.mixture import Mixture
from fvlm.data.plan import Pack, Plan
from fvlm.data.proposal import propose_plan
from fvlm.data.table import DIMENSIONS, SampleTable, sample_costs
from fvlm.model.configuration import PRESETS
from fvlm.model.flops import pack_flops
from fvlm.research.style import PALETTE, STYLE, plt
from fvlm.train.planner import geometry_of, parameters_of
from fvlm.train.traffic import PASSES, gathers_of, step_messages, use_order
from fvlm.train.work_model import SAMPLES
from fvlm.train.zero_config import read_zero_json

STAGES = ("zero0", "zero1", "zero2", "zero2_offload", "zero3")
GPUS_INSIDE = (2, 4, 8)
NODES = (2, 4, 8, 16)
GIGABITS = (25, 50, 100, 200, 400)
STEP_PACKS = 8  # packs of 16 384 rows in the planner's step of 131 072
DRAWN = 40_000  # samples of the synthetic index that stragglers are looked for in
TAR_BYTES = 1024  # header and padding of a member, about


@dataclass(frozen=True, kw_only=True)
class Loader:
    """What `benchmarks/results/dataloader-*.json` says."""

    origin: str
    frames_per_core: float
    """A second."""
    jpeg_bytes: float
    """Mean of a frame."""
    cpu: str


def inside(run: Run, gpus: int, kind: str) -> Cluster:
    """One machine."""
    return Cluster(gpus=gpus, inside={"NVLink": nvlink, "PCIe": pcie}[kind](run.gpu))


def across(run: Run, nodes: int, gigabits: float) -> Cluster:
    """Machines of 8 GPUs with NVLink."""
    return Cluster(gpus=8, inside=nvlink(run.gpu), nodes=nodes, between=network(gigabits))


def runs_of(base: Run, stages: Sequence[str] = STAGES) -> list[Run]:
    """Every model, or the measured one, in every ZeRO stage."""
    models = list(PRESETS) if base.pack_seconds is None else [base.model]
    return [replace(base, model=model, zero=zero) for model in models for zero in stages]


def messages(base: Run) -> str:
    """Bytes of a step of one pack and of four, a rank, over many ranks."""
    rows = []
    for run in runs_of(base):
        parameters, zero = parameters_of(run.model), read_zero_json(run.zero)[0]
        gathers = gathers_of(use_order(geometry_of(run.model)))
        sent = {}
        for packs in (1, 4):
            found = step_messages(parameters, zero, "bf16", packs, gathers)
            sent[packs] = sum(PASSES[m.collective] * m.size for m in found)
        rows.append(
            {"model": run.model, "ZeRO": run.zero, "1 pack, GB": f"{sent[1] / 1e9:.2f}"}
            | {"4 packs, GB": f"{sent[4] / 1e9:.2f}"}
            | {"gathers a micro-batch": f"{gathers:.2f}" if run.zero == "zero3" else None}
        )
    return markdown_table(rows)


def machine(base: Run) -> str:
    """Efficiency on one machine at a step of 131 072 rows."""
    rows = []
    for run in runs_of(base):
        row = {"model": run.model, "ZeRO": run.zero}
        for kind in ("NVLink", "PCIe"):
            for gpus in GPUS_INSIDE:
                step = simulate(run, inside(run, gpus, kind), STEP_PACKS // gpus)
                row[f"{kind} × {gpus}"] = f"{step.efficiency:.0%}"
        rows.append(row)
    return markdown_table(rows)


def nodes(base: Run) -> str:
    """Efficiency over nodes of 8 GPUs with one pack a rank; 2 / 4 / 8 / 16 nodes."""
    rows = []
    for run in runs_of(base):
        row = {"model": run.model, "ZeRO": run.zero}
        for gigabits in GIGABITS:
            found = [simulate(run, across(run, n, gigabits), 1).efficiency for n in NODES]
            row[f"{gigabits} Gb/s"] = " / ".join(f"{100 * value:.0f}" for value in found)
        rows.append(row)
    return markdown_table(rows)


def stops(base: Run) -> str:
    """How far each configuration goes, and how many packs a rank would carry it to 16 nodes."""

    def last(found: Iterable[tuple[int, float]], least: float) -> str:
        kept = 1
        for number, efficiency in found:
            if efficiency < least:
                break
            kept = number
        return str(kept)

    rows = []
    for run in runs_of(base):
        row = {"model": run.model, "ZeRO": run.zero}
        gpus = [(n, simulate(run, inside(run, n, "PCIe"), STEP_PACKS // n).efficiency) for n in GPUS_INSIDE]
        row["GPUs, PCIe"] = f"{last(gpus, 0.9)} / {last(gpus, 0.5)}"
        for gigabits in (25, 100, 400):
            found = [(n, simulate(run, across(run, n, gigabits), 1).efficiency) for n in NODES]
            row[f"nodes, {gigabits} Gb/s"] = f"{last(found, 0.9)} / {last(found, 0.5)}"
        for gigabits in (25, 100, 400):
            needed = packs_for(run, across(run, NODES[-1], gigabits), 0.9)
            row[f"packs for 90 %, {gigabits} Gb/s"] = needed
        rows.append(row)
    return markdown_table(rows)


def overlap(base: Run) -> str:
    """Efficiency without and with `overlap_comm`."""
    places = [("8 GPUs, PCIe", lambda run: inside(run, 8, "PCIe"))]
    places += [(f"16 nodes, {g} Gb/s", lambda run, g=g: across(run, 16, g)) for g in (100, 400)]
    rows = []
    for run in runs_of(base, ("zero2", "zero3")):
        row = {"model": run.model, "ZeRO": run.zero}
        for name, place in places:
            off, on = (simulate(replace(run, overlap=x), place(run), 1).efficiency for x in (False, True))
            row[name] = f"{off:.0%} → {on:.0%}"
        rows.append(row)
    return markdown_table(rows)


def loader(base: Run, found: Loader) -> str:
    """What one machine of 8 GPUs has to be fed with."""
    rows = []
    for run in runs_of(base, ("zero1",)):
        samples = samples_of_pack(run) / work(run, 1, 1).compute
        frames = samples * SAMPLES[run.stage].frames
        rows.append(
            {
                "model": run.model,
                "samples/s, a GPU": f"{samples:,.0f}",
                "frames/s, a GPU": f"{frames:,.0f}",
                "MB/s, a GPU": f"{frames * (found.jpeg_bytes + TAR_BYTES) / 1e6:,.0f}",
                "cores that load, a GPU": f"{frames / found.frames_per_core:.1f}",
                "MB/s, 8 GPUs": f"{8 * frames * (found.jpeg_bytes + TAR_BYTES) / 1e6:,.0f}",
                "cores that load, 8 GPUs": f"{8 * frames / found.frames_per_core:.0f}",
            }
        )
    return markdown_table(rows)


def packs_of_a_plan(samples: int = DRAWN, tokens: int = 16384) -> tuple[SampleTable, Mixture, Plan, list[Pack]]:
    """Stage 2 as `benchmarks.plan` draws it, packed."""
    whole = sum(source.size for source in STAGE_2)
    seeds = [np.random.default_rng([0, number]) for number in range(len(STAGE_2))]
    indexes = [
        draw_index(source, round(samples * source.size / whole), random, "none", source.name)
        for source, random in zip(STAGE_2, seeds, strict=True)
    ]
    table, mixture = SampleTable.from_indexes(indexes), Mixture()
    found = propose_plan(table, mixture, tokens=tokens, objective="ce_answer")
    plan = Plan(table, mixture, found.capacities, "ce_answer", 0, len(table), found.window)
    return table, mixture, plan, [pack for window in range(plan.num_windows) for pack in plan.window(window)]


def pack_work(model: str, table: SampleTable, mixture: Mixture, plan: Plan, packs: Sequence[Pack]) -> dict[str, Any]:
    """Operations of each pack: `necessary` ones, and those that its fixed shape lets the GPU do; float [packs]."""
    geometry, most = geometry_of(model), plan.capacities
    found = {"necessary": [], "done": []}
    for pack in packs:
        costs = sample_costs(table, pack.rows, pack.layouts, mixture, plan.objective)
        column = dict(zip(DIMENSIONS, costs.T.tolist(), strict=True))
        lengths, coarse = column["tokens"], column["coarse"]
        needed = pack_flops(
            geometry, num_frames=pack.frames, lengths=lengths, coarse_lengths=coarse, num_visual=pack.visual,
            num_labels=pack.labels,
        )  # fmt: skip
        done = pack_flops(  # rows that no sample uses meet no attention, but all else
            geometry, num_frames=most.frames, lengths=lengths + [1] * (most.tokens - pack.tokens),
            coarse_lengths=coarse + [1] * (most.coarse - pack.coarse), num_visual=most.visual,
            num_labels=most.labels,
        )  # fmt: skip
        found["necessary"].append(needed.training)
        found["done"].append(done.training)
    return {name: np.array(values) for name, values in found.items()}


def waiting(work: np.ndarray, ranks: int, packs: int) -> float:
    """How much longer the slowest rank of a step works than the mean one; rank r has packs r, r + ranks, ..."""
    steps = len(work) // (ranks * packs)
    by_rank = work[: steps * ranks * packs].reshape(steps, packs, ranks).sum(axis=1)
    return float((by_rank.max(axis=1) / by_rank.mean(axis=1)).mean() - 1)


def stragglers(base: Run) -> str:
    """Mean over steps of (slowest rank over mean rank) − 1."""
    table, mixture, plan, packs = packs_of_a_plan(tokens=base.tokens)
    rows = []
    for run in runs_of(base, ("zero1",)):
        found = pack_work(run.model, table, mixture, plan, packs)
        for name, text in (("done", "what fixed shapes do"), ("necessary", "what samples need")):
            row = {"model": run.model, "work": text}
            for ranks, number in ((2, 1), (8, 1), (8, 4), (32, 1), (128, 1)):
                row[f"{ranks} × {number}"] = f"{waiting(found[name], ranks, number):.1%}"
            rows.append(row)
    return markdown_table(rows)


def all_tables(base: Run, found: Loader) -> dict[str, str]:
    """Name of a marker → its table."""
    origin = "predicted, not measured" if base.pack_seconds is None else "pack time measured, the rest predicted"
    label = f"{base.gpu.name}, {base.stage}, packs of {base.tokens} rows: {origin}."
    tables = {
        "messages": messages(base), "machine": machine(base), "nodes": nodes(base), "stops": stops(base),
        "overlap": overlap(base), "loader": loader(base, found), "stragglers": stragglers(base),
    }  # fmt: skip
    counted = {"messages": "bf16; counted from parameters.", "stragglers": "Synthetic index; simulated, not measured."}
    more = {"loader": f" Loading was measured on {found.cpu}, `{found.origin}`."}
    return {name: f"*{counted.get(name, label)}{more.get(name, '')}*\n\n{text}" for name, text in tables.items()}


def plot(base: Run, path: Path) -> None:
    """Efficiency over GPUs, a panel for each model, as a PNG."""
    runs = runs_of(base, ("zero1", "zero3"))
    models = list(dict.fromkeys(run.model for run in runs))
    counts = [*GPUS_INSIDE, *(8 * n for n in NODES)]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(models), figsize=(3.0 * len(models), 2.6), sharey=True, squeeze=False)
        for axis, model in zip(axes[0], models, strict=True):
            for run, dash in [(run, dash) for run, dash in zip(runs, "-:" * len(models), strict=True)]:
                if run.model != model:
                    continue
                for gigabits, colour in zip((25, 100, 400), PALETTE, strict=False):
                    clusters = [inside(run, n, "NVLink") for n in GPUS_INSIDE]
                    clusters += [across(run, n, gigabits) for n in NODES]
                    found = [simulate(run, cluster, 1).efficiency for cluster in clusters]
                    axis.plot(counts, found, dash, color=colour, label=f"{run.zero}, {gigabits} Gb/s")
            axis.set(title=model, xlabel="GPUs", xscale="log", ylim=(0, 1.05), xticks=counts, xticklabels=counts)
            axis.minorticks_off()
        axes[0][0].set_ylabel("efficiency, 1 pack a rank")
        axes[0][-1].legend(fontsize=6)
        title = "predicted, not measured" if base.pack_seconds is None else "pack time measured, links predicted"
        figure.suptitle(f"{base.gpu.name}, NVLink up to 8, then nodes of 8: {title}", fontsize=8, y=1.06)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, bbox_inches="tight", metadata={"Software": None})
        plt.close(figure)
