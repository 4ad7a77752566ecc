"""What one process of `benchmarks.plan` does: all that a run does before its first pack, and then some planning."""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from pathlib import Path

import numpy as np

from benchmarks.plan_index import TOKENIZER
from fvlm.data.capacities import Capacities
from fvlm.data.chat import load_tokenizer
from fvlm.data.mixture import Mixture
from fvlm.data.plan import START, Plan, PlanState
from fvlm.data.remote import find_all
from fvlm.data.table import DIMENSIONS
from fvlm.data.table_store import open_table

TOKENS, OBJECTIVE, PACKS_PER_STEP, SEED = 16384, "ce_answer", 8, 42
MIXTURE = Mixture(text_share=0.14, question_first=0.5)
WINDOW = 8192  # what `launch/plan.py --propose` says for this index
PLANNED = 1 << 18  # samples, for the rate
_EVERY_S = 0.02
_MIB = 1 << 20


class Memory(threading.Thread):
    """Watches how much memory this process alone has, until it is stopped."""

    def __init__(self):
        super().__init__(daemon=True)
        self.most_private = 0
        self._stopped = threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(_EVERY_S):
            self.most_private = max(self.most_private, status("RssAnon"))

    def stop(self) -> int:
        """Most bytes that were private."""
        self._stopped.set()
        self.join()
        self.most_private = max(self.most_private, status("RssAnon"))
        return self.most_private


def status(name: str) -> int:
    """Bytes, from what the kernel says of this process."""
    return 1024 * int(re.search(rf"^{name}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1])


def work(folder: Path, cache: Path, seed: int | None, planned: int) -> dict[str, float]:
    """From the shards' folder to the first step, at a random place with a `seed`; then `planned` samples more."""
    tokenizer = load_tokenizer(TOKENIZER)
    private, memory = status("RssAnon"), Memory()
    memory.start()
    begin, begin_cpu = time.perf_counter(), time.process_time()
    opened = open_table(find_all(folder), tokenizer, cache)
    table_s = time.perf_counter() - begin
    capacities = Capacities.propose(opened.table, MIXTURE, tokens=TOKENS, objective=OBJECTIVE, seed=SEED, window=WINDOW)
    propose_s = time.perf_counter() - begin - table_s
    plan = Plan(opened.table, MIXTURE, capacities, OBJECTIVE, SEED, len(opened.table), WINDOW)
    plan.fingerprint()
    steps = plan.steps(PACKS_PER_STEP, START if seed is None else _random_place(plan, seed, planned))
    step = next(steps)
    found = {
        "table_s": table_s,
        "propose_s": propose_s,
        "first_pack_s": time.perf_counter() - begin,
        "first_pack_cpu_s": time.process_time() - begin_cpu,
        "first_step_samples": step.samples,
    }
    if planned:
        found |= _rate(steps, capacities, planned)
    return found | {
        "shards": len(opened.indexes),
        "private_mib": memory.stop() / _MIB,
        "private_growth_mib": (memory.most_private - private) / _MIB,
        "resident_mib": status("VmHWM") / _MIB,
    }


def _random_place(plan: Plan, seed: int, planned: int) -> PlanState:
    """A window's pack, with `planned` samples behind it."""
    random = np.random.default_rng(seed)
    left = 1 + -(-planned // WINDOW)
    return PlanState(window=int(random.integers(max(plan.num_windows - left, 1))), pack=int(random.integers(100)))


def _rate(steps, capacities: Capacities, planned: int) -> dict[str, float]:
    """Samples planned a second, by the clock and by the processor's time, and how full their packs are."""
    used, num_packs, samples = np.zeros(len(DIMENSIONS)), 0, 0
    begin, begin_cpu = time.perf_counter(), time.process_time()
    while samples < planned:
        step = next(steps)
        samples += step.samples
        num_packs += len(step.packs)
        used += np.sum([[getattr(pack, name) for name in DIMENSIONS] for pack in step.packs], axis=0)
    took, took_cpu = time.perf_counter() - begin, time.process_time() - begin_cpu
    fill = dict(zip(DIMENSIONS, (used / num_packs / capacities.as_array()).tolist(), strict=True))
    return {
        "samples_per_s": samples / took,
        "samples_per_cpu_s": samples / took_cpu,
        **{f"fill_{name}": share for name, share in fill.items()},
        "samples_per_pack": samples / num_packs,
    }


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    print(
        json.dumps(work(Path(arguments["folder"]), Path(arguments["cache"]), arguments["seed"], arguments["planned"]))
    )
