"""Data → speed check → ablations → grid → three stages → evaluation → report → export, as one list of commands.

bash launch/speedrun.sh --scale demo                                     (two CPU cores; draws its own clips)
bash launch/speedrun.sh --scale demo --dry-run                           (the commands, time and cost; runs nothing)
bash launch/speedrun.sh --scale day --dry-run --gpu h100 --price 2.5     (what a day on one GPU would hold)

The commands stand in launch/configs/speedrun/<scale>.yaml, and each can be run by hand. The same call again goes on
where it was stopped: steps that are done are passed over, and every command goes on with its own work. Written to
--out: speedrun.json (which steps are done, and how long they took), and what the commands write.

Times of the dry run are training's alone, from its operations: at the rate that the speed check of this very run has
measured, else at --tflops, else at what the planner assumes of --gpu. Without any of them only operations are shown.

Exit code 0: done, 1: a step failed, 2: wrong usage or configuration, 75: stopped, and resumable.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import psutil
import torch

from fvlm.config import CONFIGS, REPOSITORY
from fvlm.research.records import read_json
from fvlm.research.speedrun.cost import Rate, command_flops, known_rate
from fvlm.research.study.runner import told_to_stop
from fvlm.research.study.workload import StatedSample
from fvlm.schema import ConfigError, build, read_mapping, require, resolve
from fvlm.train.describe import write_json
from fvlm.train.gpus import GPUS
from fvlm.train.preemption import EXIT_CODE

SCALES = CONFIGS / "speedrun"
RECORD, SPEED = "speedrun.json", "speed.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One step of the road."""

    name: str
    says: str
    """What it is for, in a sentence."""
    run: tuple[str, ...]
    """Commands, one after the other; `$out`, `$ranks` and `$deepspeed` (the launcher with that many) are filled in."""
    sample: StatedSample | None = None
    """Mean sample of its data, for the dry run, which may come before them; null: found from their index."""
    may_say_no: bool = False
    """Whether the road goes on when its last command ends with exit code 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """A file of `launch/configs/speedrun`."""

    about: str
    steps: tuple[Step, ...]

    def __post_init__(self) -> None:
        names = [step.name for step in self.steps]
        require(len(set(names)) == len(names) > 0, "steps", names, "at least one, each with a name of its own")


def load_scale(name: str) -> Scale:
    """A scale by bare name or path; raises ConfigError."""
    return build(Scale, read_mapping(resolve(name, SCALES, ".yaml")))


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the commands are filled in with."""

    out: Path
    ranks: int
    """One a GPU, or a CPU core."""

    def commands(self, step: Step) -> list[list[str]]:
        """The step's, as lists of arguments."""
        known = {"out": self.out, "ranks": self.ranks}
        known["deepspeed"] = f"deepspeed --log_level warning --num_gpus {self.ranks}"
        try:
            return [shlex.split(Template(command).substitute(known)) for command in step.run]
        except (KeyError, ValueError) as error:
            names = ", ".join(f"${name}" for name in known)
            raise ConfigError(f"step {step.name}: {error}: expected {names} and closed quotes") from None

    def environment(self) -> dict[str, str]:
        """Of the commands: this Python and its scripts first; without GPUs a core a rank."""
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        found = {**os.environ, "PATH": path}
        if not torch.cuda.is_available():
            found |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        return found


class Runner:
    """Carries out commands, one at a time."""

    def __init__(self, machine: Machine):
        self.environment, self.stopping = machine.environment(), False
        self._child: subprocess.Popen | None = None

    def stop(self, *_: Any) -> None:
        """End the command at work, which saves; a signal's handler."""
        self.stopping = True
        if self._child is not None:
            tell_to_end(self._child)

    def call(self, command: Sequence[str]) -> int:
        """The command's exit code; 75 without running it where a signal came."""
        if self.stopping:
            return EXIT_CODE
        # in a session of its own Ctrl-C comes to us alone, and not to ranks, which would end without saving
        self._child = subprocess.Popen(command, cwd=REPOSITORY, env=self.environment, start_new_session=True)
        if self.stopping:  # the signal came between the two
            tell_to_end(self._child)
        code = self._child.wait()
        return EXIT_CODE if self.stopping else code


def tell_to_end(command: subprocess.Popen) -> None:
    """SIGTERM to the ranks that the command started, or else to the command and whatever it started.

    DeepSpeed's launcher passes the signal to nobody, and ends by itself with its ranks (docs/distribution.md).
    """
    if command.returncode is not None:  # it has ended, and its number may be another process's
        return
    with suppress(psutil.NoSuchProcess, ProcessLookupError):
        ranks = [each for each in psutil.Process(command.pid).children(recursive=True) if _is_rank(each)]
        if not ranks:
            os.killpg(command.pid, signal.SIGTERM)
        for rank in ranks:
            with suppress(psutil.NoSuchProcess):
                rank.terminate()


def _is_rank(process: psutil.Process) -> bool:
    """Whether a launcher gave it a rank; its own workers inherit that, and are none."""
    try:
        parent = process.parent()
        return "RANK" in process.environ() and (parent is None or "RANK" not in parent.environ())
    except psutil.Error:  # it has just ended
        return False


def speedrun(scale: Scale, name: str, machine: Machine) -> int:
    """Carry out the steps that are not done; the exit code."""
    with told_to_stop(Runner(machine)) as runner:
        return _go(scale, _record(machine.out, name), machine, runner)


def _go(scale: Scale, record: dict, machine: Machine, runner: Runner) -> int:
    for number, step in enumerate(scale.steps, 1):
        title = f"[{number}/{len(scale.steps)}] {step.name}"
        known = record["steps"].get(step.name)
        if known and known["run"] == list(step.run):
            print(f"{title}: done before, in {known['seconds']:.0f} s", flush=True)
            continue
        for later in scale.steps[number - 1 :]:  # what follows rests on this one
            record["steps"].pop(later.name, None)
        print(f"\n{title}: {step.says}", flush=True)
        begin = time.monotonic()
        code = _carry_out(step, machine, runner)
        if code == EXIT_CODE:
            print(f"speedrun: stopped in {step.name}; the same command goes on", flush=True)
            return EXIT_CODE
        said_no = code == 1 and step.may_say_no
        if code and not said_no:
            print(f"speedrun: {step.name} failed with exit code {code}; see above", file=sys.stderr, flush=True)
            return 1
        record["steps"][step.name] = {
            "run": list(step.run),
            "seconds": round(time.monotonic() - begin, 1),
            "said": "no" if said_no else "yes",
        }
        write_json(machine.out / RECORD, record)
    print(f"\nspeedrun: {sum(step['seconds'] for step in record['steps'].values()) / 60:.1f} minutes in all")
    return 0


def _carry_out(step: Step, machine: Machine, runner: Runner) -> int:
    for command in machine.commands(step):
        print(f"$ {shlex.join(command)}", flush=True)
        if code := runner.call(command):
            return code
    return 0


def _record(out: Path, name: str) -> dict:
    out.mkdir(parents=True, exist_ok=True)
    known = read_json(out / RECORD) if (out / RECORD).is_file() else {"scale": name, "steps": {}}
    require(known["scale"] == name, "--out", str(out), f"a new folder: it holds a run of scale {known['scale']}")
    return known


def describe(scale: Scale, machine: Machine, rate: Rate | None, price: float | None) -> str:
    """The plan: commands, operations, hours and money."""
    lines, total, unknown = [scale.about, ""], 0.0, []
    for number, step in enumerate(scale.steps, 1):
        flops = 0.0
        for command in machine.commands(step):
            try:
                flops += command_flops(command, step.sample)
            except (ConfigError, OSError) as error:
                unknown.append(f"{step.name}: {error}")
        total += flops
        cost = f" Trains with {flops:.2g} FLOP{_time(flops, rate, price)}" if flops else ""
        lines += [f"[{number}/{len(scale.steps)}] {step.name}: {step.says}{cost}"]
        lines += [f"    $ {shlex.join(command)}" for command in machine.commands(step)]
    lines += ["", f"in all: trains with {total:.3g} FLOP{_time(total, rate, price)}"]
    lines.append(
        "evaluations, start-ups, data and benchmarks come on top" if rate else "times: see --help, --tflops, --gpu"
    )
    lines += [f"rate: {rate.flops / 1e12:.3g} TFLOP/s in all, {rate.source}"] if rate else []
    return "\n".join(lines + [f"not counted: {each}" for each in unknown])


def _time(flops: float, rate: Rate | None, price: float | None) -> str:
    if rate is None:
        return ""
    hours = flops / rate.flops / 3600
    money = "" if price is None else f", {hours * rate.devices * price:.2f} at {price:g} an hour and device"
    return f": {hours:.2f} hours{money}" if hours >= 1 else f": {60 * hours:.1f} minutes{money}"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="speedrun.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", required=True, help="demo, day or full, or a file like theirs")
    parser.add_argument("--out", type=Path, help="folder that all is written to; default runs/speedrun-<scale>")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, its time and cost, and run nothing")
    parser.add_argument("--gpu", choices=GPUS, help="for the dry run: whose assumed rate and price to take")
    parser.add_argument("--tflops", type=float, help="for the dry run: TFLOP/s that training reaches on a device")
    parser.add_argument("--price", type=float, help="for the dry run: money for one device for an hour")
    parser.add_argument("--devices", type=int, help="GPUs or CPU cores; default: all GPUs, or 2 cores; 1 with --gpu")
    args = parser.parse_args(arguments)
    for name in ("tflops", "devices"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            parser.error(f"--{name} {getattr(args, name)}: expected more than 0")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Run or print the plan; the exit code."""
    args = parse(arguments)
    cores = min(2, len(os.sched_getaffinity(0)))
    devices = args.devices or (1 if args.gpu else torch.cuda.device_count() or cores)
    out = args.out or Path("runs") / f"speedrun-{Path(args.scale).stem}"
    try:
        scale, machine = load_scale(args.scale), Machine(out=out, ranks=devices)
        for step in scale.steps:
            machine.commands(step)  # a mistake in the last step is not to be found in the last hour
        if args.dry_run:
            rate = known_rate(out / SPEED, args.tflops, args.gpu, devices)
            price = args.price if args.price is not None else GPUS[args.gpu].price if args.gpu else None
            print(describe(scale, machine, rate, price))
            return 0
        return speedrun(scale, Path(args.scale).stem, machine)
    except (ConfigError, ValueError, OSError) as error:
        print(f"speedrun: {error}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, ConfigError) else 1


if __name__ == "__main__":
    sys.exit(main())
