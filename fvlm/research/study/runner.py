"""Studies: lists of runs that differ in configuration, carried out as processes, restartable, tabulated as CSVs.

A study lives in one folder: `plan.json` and `base.yaml` (what is to be run), a folder a run, and the tables that
`fvlm.research.study.tables` writes after every run. The same call again goes on: finished runs are left alone, stopped
ones continue, failed ones are tried once more. Runs that were done elsewhere, and whose tables are here
(`fvlm.research.study.elsewhere`), are left alone too, unless one that is to be run starts from their weights.
"""

from __future__ import annotations

import fcntl
import logging
import queue
import shutil
import signal
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from fvlm.config import RunConfig, config_hash
from fvlm.research.study.elsewhere import ELSEWHERE, read_elsewhere
from fvlm.research.study.plan import PlannedRun, read_plan, require_base, run_config, with_needed, write_plan
from fvlm.research.study.processes import Children, Launcher, carry_out, read_record, refuse
from fvlm.research.study.tables import collect
from fvlm.schema import ConfigError
from fvlm.train.preemption import EXIT_CODE

__all__ = ["Launcher", "PlannedRun", "Study", "collect_again", "read_plan", "run_study"]

logger = logging.getLogger(__name__)

LOCK = ".lock"
SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True, kw_only=True)
class Study:
    """How a study's runs ended."""

    out: Path
    statuses: dict[str, str]
    """Run → done, failed, stopped or not_run; of the runs that were asked for."""

    @property
    def exit_code(self) -> int:
        """0: all done; 75: some stopped, and the same call goes on; 1: some failed."""
        ended = set(self.statuses.values())
        return EXIT_CODE if ended & {"stopped", "not_run"} else 1 if "failed" in ended else 0


def run_study(
    runs: Sequence[PlannedRun],
    base: RunConfig,
    out: str | Path,
    *,
    launcher: Launcher | None = None,
    only: Collection[str] | None = None,
    keep_checkpoints: bool = False,
) -> Study:
    """Carries out the runs, and tabulates after each one; to be called from the main thread.

    Args:
        runs: the plan; the tables have a row for each.
        base: what their overrides are on top of.
        out: the study's folder.
        only: names of the runs to carry out, with those that they start from; None: all.
        keep_checkpoints: keep those of finished runs; else only of the runs that others start from.

    Raises:
        ConfigError: a run cannot be, `out` holds a study of another base, or a study is at work there.
    """
    out, launcher = Path(out), launcher or Launcher()
    names = with_needed([run.name for run in runs] if only is None else only, runs)
    there = _done_elsewhere(names, runs, base, out)
    names = with_needed(names - there, runs)
    chosen = [run for run in runs if run.name in names]
    out.mkdir(parents=True, exist_ok=True)
    with _alone_in(out) as lock, told_to_stop(Children(lock)) as children:
        configs = write_plan(runs, base, out)
        needed = {run.after for run in runs if run.after} if not keep_checkpoints else {run.name for run in runs}
        slots: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(launcher.parallel):
            slots.put(slot)
        futures: dict[str, Future] = {}

        def work(run: PlannedRun) -> dict[str, Any]:
            before = futures[run.after].result()["status"] if run.after else "done"
            if children.stopping:
                return {"status": "not_run", "reason": None}
            if before != "done":
                return refuse(out / run.name, configs[run.name], f"it starts from {run.after}, which is {before}")
            slot = slots.get()
            try:
                record = carry_out(run, configs[run.name], out, launcher, slot, children)
            finally:
                slots.put(slot)
            if record["status"] == "done" and run.name not in needed:
                shutil.rmtree(out / run.name / "checkpoints", ignore_errors=True)
            return record

        with ThreadPoolExecutor(launcher.parallel) as pool, logging_redirect_tqdm():
            for run in chosen:  # in the plan's order, so that a run finds the one it starts from
                futures[run.name] = pool.submit(work, run)
            try:
                statuses = _watch(futures, runs, out, children)
            except BaseException:
                children.stop()  # or the pool would wait for all that is left
                raise
        collect(runs, out)
    return Study(out=out, statuses={**dict.fromkeys(there, "done"), **statuses})


def _done_elsewhere(names: Collection[str], runs: Sequence[PlannedRun], base: RunConfig, out: Path) -> set[str]:
    """Of the runs named, those without a record here and with rows of their configuration in tables elsewhere."""
    rows = read_elsewhere(out)
    hashes = {run.name: config_hash(run_config(run, base, out)) for run in runs if run.name in names}
    known = {name for name in hashes if (name, hashes[name]) in rows and read_record(out / name, hashes[name]) is None}
    others = sorted({name for name, digest in rows if name in hashes and hashes[name] != digest} - known)
    if rows:
        logger.info("%s: %d of the runs asked for are done there", out / ELSEWHERE, len(known))
    if others:
        logger.info("%s: of another configuration, and run again: %s", out / ELSEWHERE, ", ".join(others))
    return known


def collect_again(runs: Sequence[PlannedRun], base: RunConfig, out: Path) -> None:
    """Writes the tables of a study anew, and runs nothing.

    Raises ConfigError where `out` holds a study of another base, or a study is at work there, which writes them itself.
    """
    require_base(base, out)
    with _alone_in(out):
        collect(runs, out)


def _watch(futures: dict[str, Future], runs: Sequence[PlannedRun], out: Path, children: Children) -> dict[str, str]:
    """Status of each run, as they end; the tables are written anew every time."""
    names, statuses = {future: name for name, future in futures.items()}, {}
    for future in tqdm(as_completed(names), total=len(names), unit="run"):
        name, record = names[future], future.result()
        statuses[name] = record["status"]
        if not children.stopping:
            logger.info("%s: %s%s", name, record["status"], f": {record['reason']}" if record["reason"] else "")
            collect(runs, out)
    return statuses


@contextmanager
def _alone_in(out: Path) -> Iterator[IO[str]]:
    """The locked file, which the study's processes hold as well; raises ConfigError while one of them is at work."""
    with (out / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{out}: a study, or a run that a killed one left behind, is at work there; wait for it, or end it"
            ) from None
        yield file


class Stoppable(Protocol):
    """Has processes at work."""

    def stop(self, *_: Any) -> None:
        """Tell them to end."""


Worker = TypeVar("Worker", bound=Stoppable)


@contextmanager
def told_to_stop(worker: Worker) -> Iterator[Worker]:
    """SIGTERM and SIGINT end its processes, which save; whatever else ends the block ends them too."""
    before = {number: signal.signal(number, worker.stop) for number in SIGNALS}
    try:
        yield worker
    except BaseException:
        worker.stop()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
