"""What a torch.profiler trace of training steps says: time by phase and by kernel, idle time and launches.

Everything is read off the trace file (Chrome's format, as Perfetto shows it), so a trace of another day or machine can
be read again: `python -m benchmarks.profile --read FILE`.

The profiled program marks each step, the wait for the device after the last one, and the phases of the forward pass
with ranges (`STEP`, `DRAIN`, `PHASE` + name); on a GPU it waits for the device before the first one, too. The
backward pass is told apart by autograd's sequence numbers: the last forward operation that shows a number made the node
that has it, so its phase is the node's. What a node does is its own, recomputed blocks included.
"""

from __future__ import annotations

import gzip
import json
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.counters import LAUNCHES

STEP, DRAIN, PHASE = "fvlm step", "fvlm drain", "fvlm phase: "
FORWARD = ("encoder", "coarse LLM", "queries", "fine LLM", "head")
GRADIENTS, COMMUNICATION, COPY, WAIT, REST = "gradients", "communication", "copy", "wait for the device", "rest"
BACKWARD = "backward of "
ORDER = (
    "load", COPY, *FORWARD, *(BACKWARD + name for name in reversed(FORWARD)), GRADIENTS, "optimizer", COMMUNICATION,
    WAIT, REST,
)  # fmt: skip
"""`gradients`: their accumulation, and what the engine hangs on it; `rest`: what is in no other phase."""
_NODE = "autograd::engine::evaluate_function: "
_COLLECTIVES = ("c10d::", "nccl:", "gloo:")
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_ON_HOST = ("cpu_op", "user_annotation", "cuda_runtime", "cuda_driver")


@dataclass
class Reading:
    """Times in milliseconds, over all steps of the trace."""

    steps: int
    wall: float
    """From the first step's start until the device is done with the last."""
    host: Counter[str] = field(default_factory=Counter)
    """By phase; together they are `wall`."""
    device: Counter[str] = field(default_factory=Counter)
    """By the phase that launched the work; empty without a GPU. Streams may overlap."""
    busy: float = 0.0
    """Time in which the device did anything."""
    launches: int = 0
    kernels: Counter[str] = field(default_factory=Counter)
    """By name: on the device; without one, operations on the host without what they call."""
    calls: Counter[str] = field(default_factory=Counter)

    @property
    def idle_share(self) -> float | None:
        """Of `wall`, what the device spent with nothing to do; None without one."""
        return 1 - self.busy / self.wall if self.device else None


def read_trace(path: Path) -> Reading:
    """Read a `.json` or `.json.gz` trace. Raises ValueError for one without marked steps."""
    contents = path.read_bytes()
    contents = gzip.decompress(contents) if path.suffix == ".gz" else contents
    events = [event for event in json.loads(contents)["traceEvents"] if event.get("ph") == "X"]
    marks = [event for event in events if event["cat"] == "user_annotation" and event["name"] in (STEP, DRAIN)]
    if not marks:
        raise ValueError(f"{path}: no range named {STEP!r}: expected a trace of benchmarks.profile")
    start, end = min(e["ts"] for e in marks), max(e["ts"] + e["dur"] for e in marks)
    reading = Reading(steps=sum(mark["name"] == STEP for mark in marks), wall=(end - start) / 1e3)
    within = [event for event in events if start <= event["ts"] < end]
    host = _Host(reading)
    for event in sorted((e for e in within if e["cat"] in _ON_HOST), key=lambda e: (e["ts"], -e["dur"])):
        host.add(event)
    host.finish()
    device = [event for event in within if event["cat"] in _ON_DEVICE]
    if device:
        _read_device(device, host.launched, end, reading)
    return reading


@dataclass
class _Open:
    """An event on a thread whose end has not been reached."""

    event: dict[str, Any]
    end: float
    phase: str
    inner: float = 0.0
    """Time of the events directly within."""


class _Host:
    """Gives every moment of the threads that work for a step to a phase; takes events in the order of their start."""

    def __init__(self, reading: Reading):
        self.reading = reading
        self.open: dict[Any, list[_Open]] = defaultdict(list)
        self.made_by: dict[int, str] = {}
        """Sequence number → phase of the forward pass."""
        self.launched: dict[int, str] = {}
        """Correlation of a launch → phase."""

    def add(self, event: dict[str, Any]) -> None:
        """The next event."""
        stack = self.open[event["tid"]]
        while stack and stack[-1].end <= event["ts"]:
            self._close(stack)
        end = event["ts"] + event["dur"]
        if stack:
            end = min(end, stack[-1].end)
            stack[-1].inner += end - event["ts"]
        phase = self._phase(event, stack[-1].phase if stack else None)
        stack.append(_Open(event, end, phase))
        arguments = event.get("args", {})
        if "Sequence number" in arguments and not arguments.get("Fwd thread id") and not phase.startswith(BACKWARD):
            self.made_by[arguments["Sequence number"]] = phase
        if event["cat"].startswith("cuda"):
            self.launched[arguments.get("correlation", -1)] = phase
            self.reading.launches += bool(LAUNCHES.match(event["name"]))

    def finish(self) -> None:
        """No more events. What no phase claims is the rest."""
        for stack in self.open.values():
            while stack:
                self._close(stack)
        self.reading.host[REST] = 0.0
        self.reading.host[REST] = self.reading.wall - self.reading.host.total()

    def _phase(self, event: dict[str, Any], outer: str | None) -> str:
        name, seen = event["name"], outer or REST
        if name.startswith(_COLLECTIVES):
            return COMMUNICATION
        if name.startswith(_NODE):
            number = event.get("args", {}).get("Sequence number")
            made_by = REST if number is None else self.made_by.get(number, REST)
            return GRADIENTS if "AccumulateGrad" in name else BACKWARD + made_by if made_by in FORWARD else REST
        if name.startswith(PHASE) and not seen.startswith(BACKWARD):  # within these, it is being recomputed
            return name.removeprefix(PHASE)
        return seen

    def _close(self, stack: list[_Open]) -> None:
        closed = stack.pop()
        own = (closed.end - closed.event["ts"] - closed.inner) / 1e3
        self.reading.host[closed.phase] += own
        if closed.event["cat"] == "cpu_op":
            self.reading.kernels[closed.event["name"]] += own
            self.reading.calls[closed.event["name"]] += 1


def _read_device(events: list[dict[str, Any]], launched: dict[int, str], end: float, reading: Reading) -> None:
    """Add what ran on the device until `end`."""
    reading.kernels.clear()
    reading.calls.clear()
    done = 0.0
    for event in sorted(events, key=lambda e: e["ts"]):
        start, name = event["ts"], event["name"]
        phase = launched.get(event.get("args", {}).get("correlation", -1), REST)
        phase = COMMUNICATION if "nccl" in name.lower() else COPY if "HtoD" in name else phase
        stop = min(start + event["dur"], end)
        reading.device[phase] += (stop - start) / 1e3
        reading.kernels[name] += (stop - start) / 1e3
        reading.calls[name] += 1
        reading.busy += max(0.0, stop - max(start, done)) / 1e3
        done = max(done, stop)
