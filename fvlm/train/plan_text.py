"""A predicted plan as text: one machine in full, or a table of many."""

from __future__ import annotations

from collections.abc import Sequence

from fvlm.train.gpus import GIB
from fvlm.train.planner import Choice, Request, summary


def text_of(request: Request, choice: Choice) -> str:
    """One plan for people."""
    found = summary(request, choice)
    shares, capacities = choice.checkpointing, choice.capacities
    lines = [
        f"{request.model}, {request.stage}, {request.gpu.name} x {request.ranks}: everything below is predicted",
        "",
        f"  --ds_config {found['ds_config']}",
        f"  train.activation_checkpointing={{encoder: {shares.encoder:g}, llm: {shares.llm:g}}}",
        f"  data.tokens={capacities.tokens} data.frames={capacities.frames} "
        f"train.packs_per_step={found['packs_per_step']}",
        "",
        "  memory of each GPU at the worst moment, GiB",
        *(f"    {name:24}{size:8.2f}" for name, size in found["memory_gib"].items()),
        f"    {'in all':24}{found['memory_total_gib']:8.2f}   of {request.limit:g}",
    ]
    limit = "" if request.host_limit is None else f"   of {request.host_limit:.4g}"
    lines += [
        "",
        "  the machine's own memory at the worst moment, beside Python and its libraries, GiB",
        *(f"    {name:28}{size:8.2f}" for name, size in found["host_memory_gib"].items()),
        f"    {'in all':28}{found['host_memory_total_gib']:8.2f}{limit}",
    ]
    parts = ", ".join(f"{name} {value:.2f}" for name, value in found["step_seconds"].items() if value)
    utilisation, price = found["utilisation"], found["usd_per_gpu_hour"]
    lines += [
        "",
        f"  step {choice.time.seconds:.2f} s ({parts}), {found['samples_per_step']:.0f} samples; "
        f"{found['samples_per_second']:.0f} samples/s, MFU {found['mfu']:.1%}",
        f"  {found['samples']:,} samples: {found['hours']:.1f} h, {found['gpu_hours']:.1f} GPU hours, "
        f"{found['usd']:,.0f} US dollars",
        f"  utilisation while computing {utilisation['value']:.0%} ({utilisation['origin']}), "
        f"{price['value']:.2f} US dollars a GPU hour ({price['origin']})",
    ]
    return "\n".join(lines)


def table_of(planned: Sequence[tuple[Request, Choice | None]]) -> str:
    """One line a machine, in markdown."""
    head = "| model | GPU | x | ZeRO | recomputed, encoder / LLM | T | F | GiB | samples/s | hours | US dollars |"
    lines = ["Everything below is predicted.", "", head, "|---" * 11 + "|"]
    for request, choice in planned:
        start = f"| {request.model} | {request.gpu.name} | {request.ranks} |"
        if choice is None:
            lines.append(f"{start} nothing fits |" + " |" * 7)
            continue
        found, shares = summary(request, choice), choice.checkpointing
        lines.append(
            f"{start} {choice.zero} | {shares.encoder:g} / {shares.llm:g} | {choice.capacities.tokens} | "
            f"{choice.capacities.frames} | {choice.total / GIB:.1f} | {choice.samples_per_second:.0f} | "
            f"{found['hours']:.1f} | {found['usd']:,.0f} |"
        )
    return "\n".join(lines)
