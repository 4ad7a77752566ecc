"""What the commands of a speedrun train, in operations, and how fast a machine makes them."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fvlm.config import RunConfig, load_config
from fvlm.research.ablation.arms import plan_ablations
from fvlm.research.ablation.matrix import load_matrix
from fvlm.research.records import read_json
from fvlm.research.scaling.grid import load_grid, plan_grid
from fvlm.research.study.workload import StatedSample, workload
from fvlm.schema import ConfigError
from fvlm.train.gpus import GPUS
from fvlm.train.work_model import ASSUMED_MFU


@dataclass(frozen=True, kw_only=True)
class Rate:
    """Operations a second of all devices together."""

    flops: float
    devices: int
    source: str


def known_rate(speed: Path, tflops: float | None, gpu: str | None, devices: int) -> Rate | None:
    """What a speed check has measured, else what is stated, else what the planner assumes of a GPU; None without any.

    Args:
        speed: result file of `benchmarks/throughput.py`, which measures one device.
    """
    if speed.is_file():
        figures = read_json(speed)["figures"]
        flops = figures["product/mfu"] * figures["peak_tflops"] * 1e12
        return Rate(flops=flops * devices, devices=devices, source=f"as {speed} measured it on one device")
    if tflops is not None:
        return Rate(flops=tflops * 1e12 * devices, devices=devices, source="as --tflops says of each device")
    if gpu is not None:
        flops = ASSUMED_MFU["135m"] * GPUS[gpu].peak
        source = f"{ASSUMED_MFU['135m']:.0%} of the peak, as the planner assumes for 135m; not measured"
        return Rate(flops=flops * devices, devices=devices, source=source)
    return None


def command_flops(command: Sequence[str], sample: StatedSample | None) -> float:
    """Forward and backward operations of what a command trains; 0 for one that trains nothing.

    `sample` is the data's mean sample; None: it is found from their index. Raises ConfigError where that is not there.
    """
    names = [Path(word).name for word in command]
    for script, count in (("train.py", _run), ("ablate.py", _ablations), ("scaling_grid.py", _grid)):
        if script in names:
            return count(list(command[names.index(script) + 1 :]), sample)
    return 0.0


def _run(arguments: list[str], sample: StatedSample | None) -> float:
    return _flops(load_config(_option(arguments, "--config"), _overrides(arguments)), sample)


def _ablations(arguments: list[str], sample: StatedSample | None) -> float:
    name, own = _option(arguments, "--base"), _overrides(arguments)
    matrix = load_matrix(_option(arguments, "--matrix", "ablations"))
    asked = {"only": _options(arguments, "--only"), "seeds": [int(seed) for seed in _options(arguments, "--seeds")]}
    with tempfile.TemporaryDirectory() as folder:
        plan = plan_ablations(matrix, load_config(name, own), Path(folder), **asked)
    chosen = plan.chosen | {run.after for run in plan.runs if run.name in plan.chosen}
    runs = [run for run in plan.runs if run.name in chosen]
    return sum(_flops(load_config(name, [*own, *run.overrides]), sample) for run in runs)


def _grid(arguments: list[str], sample: StatedSample | None) -> float:
    grid, overrides = load_grid(_option(arguments, "--grid", "grid"), _overrides(arguments))
    return sum(run.flops for run in plan_grid(replace(grid, sample=sample or grid.sample), overrides))


def _flops(config: RunConfig, sample: StatedSample | None) -> float:
    return workload(config, sample).flops_per_sample * config.train.total_samples


def _overrides(arguments: Sequence[str]) -> list[str]:
    return [each for each in arguments if "=" in each and not each.startswith("--")]


def _option(arguments: Sequence[str], name: str, default: str | None = None) -> str:
    found = _options(arguments, name)
    if found:
        return found[0]
    if default is None:
        raise ConfigError(f"{name}: missing in the command")
    return default


def _options(arguments: Sequence[str], name: str) -> list[str]:
    if name not in arguments:
        return []
    found = []
    for each in arguments[arguments.index(name) + 1 :]:
        if each.startswith("--") or "=" in each:
            break
        found.append(each)
    return found
