"""Figures, tables and the plot of a throughput run, and its comparison with the last committed one."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch

from benchmarks.environment import ROOT
from benchmarks.throughput_ladder import Climbed
from benchmarks.throughput_measure import Counts, Measured
from benchmarks.timing import Timer, summary
from fvlm.model.flops import peak_flops
from fvlm.research.style import PALETTE, STYLE, save_figure
from fvlm.train.gpus import GIB

CHECK_TOLERANCE = 0.10
"""Share of a committed speed-up that may be missing before `--check` fails."""
FORMULA = (
    "MFU = necessary operations / (seconds x peak): forward x 3, a multiply-add is two, causal attention is half the "
    "square, no padding, nothing twice (fvlm.model.flops); HFU also counts what is computed again in the backward pass"
)


@dataclass(frozen=True)
class Peak:
    """The rate that MFU is held against."""

    flops: float
    """Operations a second."""
    source: str

    @classmethod
    def of(cls, device: torch.device, dtype: str) -> Peak:
        """The data sheet's bf16 rate of a known GPU; else that of a product of square matrices, measured now."""
        if device.type == "cuda" and dtype == "bf16" and (known := peak_flops(torch.cuda.get_device_name(device))):
            return cls(known, "dense bf16 of the data sheet")
        kind = torch.bfloat16 if dtype == "bf16" else torch.float32
        size = 8192 if device.type == "cuda" else 1024
        measured = Timer(device, runs=7).gemm_rate(size, kind) * 1e12
        on_gpu = device.type == "cuda"
        where = torch.cuda.get_device_name(device) if on_gpu else f"{torch.get_num_threads()} CPU threads"
        return cls(measured, f"{dtype} product of {size} x {size} matrices on {where}, measured in this run")


def rates(name: str, measured: Measured, counts: Sequence[Counts], peak: Peak, recomputes: bool) -> dict[str, float]:
    """Flat figures of a contender; `counts` are those of each turn's timed steps.

    `recomputes`: whether it follows `train.activation_checkpointing`, as the product does; else there is no HFU.
    """
    per_second = [each.samples / seconds for each, seconds in zip(counts, measured.seconds, strict=True)]
    spread, total, seconds = summary(per_second), Counts.sum(counts), sum(measured.seconds)
    figures = {
        "samples_per_s": spread.median,
        "samples_per_s_p20": spread.p20,
        "samples_per_s_p80": spread.p80,
        "frames_per_s": spread.median * total.frames / total.samples,
        "tokens_per_s": spread.median * total.tokens / total.samples,
        "mfu": spread.median * total.necessary / total.samples / peak.flops,
        "peak_gib": measured.peak_bytes / GIB,
        "data_wait_share": sum(measured.waits) / seconds,
    }
    if recomputes:
        figures["hfu"] = spread.median * total.executed / total.samples / peak.flops
    return {f"{name}/{key}": value for key, value in figures.items()}


def row(name: str, figures: Mapping[str, Any], factors: Mapping[str, str]) -> dict[str, str | None]:
    """A contender's line of the table."""

    def shown(key: str, form: str) -> str | None:
        value = figures.get(f"{name}/{key}")
        return None if value is None else format(value, form)

    middle, low, high = (shown(f"samples_per_s{end}", ".3g") for end in ("", "_p20", "_p80"))
    return {
        "": name,
        "samples/s (p20-p80)": f"{middle} ({low}-{high})",
        **factors,
        "frames/s": shown("frames_per_s", ".3g"),
        "tokens/s": shown("tokens_per_s", ".4g"),
        "MFU": shown("mfu", ".1%"),
        "HFU": shown("hfu", ".1%"),
        "peak GiB": shown("peak_gib", ".2f"),
        "data wait": shown("data_wait_share", ".1%"),
    }


def ladder_rows(climbed: Sequence[Climbed], not_run: Mapping[str, str], figures: Mapping[str, Any]) -> list[dict]:
    """The ladder's table; what did not run is a line, too."""
    rows = []
    for each in climbed:
        over = f"{each.factor.median:.2f} ({each.factor.p20:.2f}-{each.factor.p80:.2f}) over {each.against}"
        factors = {"factor": over if each.against else None, "to the first": f"{each.to_first:.2f}"}
        rows.append(row(each.name, figures, factors))
    return rows + [dict.fromkeys(rows[0]) | {"": name, "factor": f"not run: {why}"} for name, why in not_run.items()]


def plot(climbed: Sequence[Climbed], figures: Mapping[str, Any], title: str, stem: Path) -> Path:
    """The ladder as bars with p20 to p80, each with its factor to the first; returns the PNG's path."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.5, 0.6 + 0.32 * len(climbed)))
        for place, each in enumerate(climbed):
            middle, low, high = (figures[f"{each.name}/samples_per_s{end}"] for end in ("", "_p20", "_p80"))
            is_last = all(other.against != each.name for other in climbed) and each.against is not None
            colour = PALETTE[1] if place == 0 else PALETTE[5] if is_last else PALETTE[0]
            errors = [[max(0.0, middle - low)], [max(0.0, high - middle)]]
            axes.barh(place, middle, color=colour, xerr=errors, error_kw={"elinewidth": 1, "capsize": 2})
            axes.annotate(f"{each.to_first:.2f}×", (high, place), (4, 0), textcoords="offset points", va="center")
        axes.set_yticks(range(len(climbed)), [each.name.replace("_", " ") for each in climbed])
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_xlabel("samples a second, median and p20 to p80")
        axes.set_title(title)
        return save_figure(figure, stem)[0]


def committed(path: Path) -> dict[str, Any] | None:
    """What the newest commit holds under `path`, or None: not there, or no repository."""
    try:
        place = path.resolve().relative_to(ROOT)
    except ValueError:  # not in the repository
        return None
    show = ["git", "-C", str(ROOT), "show", f"HEAD:{place}"]
    done = subprocess.run(show, capture_output=True, text=True, check=False)
    return json.loads(done.stdout) if done.returncode == 0 else None


def check(now: Mapping[str, Any], before: Mapping[str, Any] | None) -> tuple[bool, str]:
    """(whether the speed-up is still there, a sentence on it), of two result files' contents."""
    if before is None:
        return True, "check: no committed result of this machine, model and mix to compare with"
    then = before.get("settings", {})
    changed = [f"{key} {then.get(key)} -> {value}" for key, value in now["settings"].items() if then.get(key) != value]
    if changed:
        return True, f"check: not compared, the committed result is of other settings ({', '.join(changed)})"
    new, old = now["figures"]["speedup"], before["figures"]["speedup"]
    least, place = (1 - CHECK_TOLERANCE) * old, before.get("commit", "unknown")[:12]
    if new < least:
        return False, (
            f"check: {new:.2f} times the baseline, at commit {place} it was {old:.2f}; expected at least {least:.2f} "
            f"({CHECK_TOLERANCE:.0%} tolerance). Run it again on idle cores; if it stays, the step has become slower"
        )
    return True, f"check: {new:.2f} times the baseline; at commit {place} it was {old:.2f}, and {least:.2f} is enough"
