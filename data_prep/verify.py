"""Command: check shards to the last byte, and report what they hold."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from tqdm import tqdm

from data_prep.validation import RECORD
from data_prep.verify_findings import Findings, Problem
from data_prep.verify_set import SampleSet
from data_prep.verify_shard import Checks, verify_shard
from fvlm.data.chat import load_tokenizer
from fvlm.data.shard import find_shards

DESCRIPTION = """Check shards to the last byte, and report what they hold.

Reads every tar through: damaged or cut archives, members that no sample claims, metadata and frames that cannot be
used, JPEGs that do not decode or have another size, and whatever the index says otherwise (offsets, sizes, frame and
token counts, bytes that changed since). Then, over all shards: samples with the same content, and validation samples
that occur in training. Every problem is one line: shard, key, reason, detail. The shards are not changed.

example:
  python -m data_prep.verify --shards shards/train --val shards/val --out report/

Exit code 0: clean, 1: problems were found (or nothing could be checked), 2: wrong usage.
"""
MOST_LISTED = 1000
"""Problems of one reason in report.json; all are printed and counted."""
_AHEAD = 3  # shards under way for each process


class Ledger:
    """Every problem printed as it comes, and counted by reason."""

    def __init__(self):
        self.counts: Counter = Counter()
        self.listed: list[Problem] = []
        self.notes: list[str] = []

    def add(self, problem: Problem) -> None:
        shard, key, reason, detail = problem
        tqdm.write(f"{shard}{', ' if key else ''}{key}: {reason}: {detail}")
        self.counts[reason] += 1
        if self.counts[reason] <= MOST_LISTED:
            self.listed.append(problem)


def verify(shards: list[Path], val: list[Path], checks: Checks, workers: int) -> tuple[dict[str, SampleSet], Ledger]:
    """Check the shards of both sets. Raises OSError or ValueError for a tokenizer that cannot be loaded."""
    load_tokenizer(checks.tokenizer or "tiny")  # here, for one message instead of one a process
    ledger, sets = Ledger(), {}
    for name, paths in (("train", shards), ("val", val)):
        if not paths:
            continue
        sets[name] = SampleSet(name)
        for found in tqdm(_checked(paths, checks, workers), total=len(paths), unit="shard", desc=f"verify {name}"):
            for problem in found.problems:
                ledger.add(problem)
            sets[name].add(found)
        for folder in sorted({path.parent for path in paths}):
            for index in sorted(folder.glob("*.idx")):
                if not index.with_suffix(".tar").exists():
                    ledger.add(Problem(str(index.with_suffix(".tar")), "", "missing_tar", "its index is there"))
        for problem in sets[name].duplicates():
            ledger.add(problem)
        ledger.notes += [f"{name}: {count} {what}" for what, count in sets[name].notes.items()]
    if val:
        _compare(sets["train"], sets["val"], {path.parent for path in val}, ledger)
    return sets, ledger


def _checked(shards: list[Path], checks: Checks, workers: int) -> Iterator[Findings]:
    """The findings in the shards' order. A shard that takes its process down is a problem of that shard."""
    done = 0
    while done < len(shards):
        try:
            for found in _in_processes(shards[done:], checks, workers):
                yield found
                done += 1
        except BrokenProcessPool:  # one of those under way: each by itself, to find out which
            for path in shards[done : done + _AHEAD * workers]:
                try:
                    [found] = _in_processes([path], checks, 1)
                except BrokenProcessPool:
                    found = Findings(shard=str(path))
                    found.report("", "crashed", "the process that checked it died: out of memory, or a decoder's fault")
                yield found
                done += 1


def _in_processes(shards: list[Path], checks: Checks, workers: int) -> Iterator[Findings]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data_prep.verify_shard"])  # seconds of imports, once and not a process
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        ahead: deque = deque()
        for path in shards:
            ahead.append(pool.submit(verify_shard, path, checks))
            if len(ahead) == _AHEAD * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _compare(train: SampleSet, val: SampleSet, folders: set[Path], ledger: Ledger) -> None:
    """Validation samples that occur in training are a problem, unless the set was drawn from training and is so still:
    then training leaves them out by content."""
    is_drawn = False
    for folder in sorted(folders):
        try:
            record = json.loads((folder / RECORD).read_text())
            is_drawn = record["digest"] == val.digest()
        except FileNotFoundError:
            continue
        except (OSError, ValueError, LookupError, TypeError) as error:
            ledger.add(Problem(str(folder / RECORD), "", "bad_record", f"{type(error).__name__}: {error}"))
            continue
        if not is_drawn:
            detail = f"it records contents {record['digest']}, the shards hold {val.digest()}"
            ledger.add(Problem(str(folder / RECORD), "", "changed_validation_set", detail))
    common = list(val.also_in(train))
    if is_drawn:
        ledger.notes.append(
            f"{len(common)} of {len(val)} validation samples are in the training shards, which they were drawn from "
            f"({RECORD}): a run leaves them out where its data.val names this set"
        )
        return
    for problem in common:
        ledger.add(problem)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.verify",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shards", nargs="+", required=True, help="training shards: folders, patterns or .tar files")
    parser.add_argument(
        "--val", nargs="+", default=[], help="validation shards, checked too and compared with training"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for report.md, report.json, figures and sheets")
    parser.add_argument("--decode", type=_share, default=1.0, help="share of the frames to decode (default 1.0: all)")
    parser.add_argument("--size", type=int, help="side of the frames in pixels (default: as prepared, where on record)")
    parser.add_argument("--tokenizer", help="counts tokens anew (default: the built-in one, for shards it counted)")
    parser.add_argument("--seed", type=int, default=0, help="chooses the samples on the sheets (default 0)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    asked = parser.parse_args(arguments)
    if asked.workers < 1:
        parser.error(f"--workers {asked.workers}: expected 1 or more")
    return asked


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a share from 0 to 1")
    return value


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    asked = parse(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a process a core is parallel enough
    checks = Checks(tokenizer=asked.tokenizer, decode=asked.decode, size=asked.size, seed=asked.seed)
    try:
        shards, val = find_shards(asked.shards), find_shards(asked.val)
        sets, ledger = verify(shards, val, checks, asked.workers)
        if asked.out is not None:
            from data_prep.verify_report import write_report  # with matplotlib, which the processes can do without

            print(f"report: {write_report(asked.out, sets, ledger, checks)}")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name, each in sets.items():
        totals = each.totals()
        print(f"{name}: {totals['samples']} samples, {totals['distinct']} distinct, {totals['frames']} frames")
    for note in ledger.notes:
        print(f"note: {note}")
    for reason, count in ledger.counts.most_common():
        print(f"  {count:8d}  {reason}")
    print(f"{ledger.counts.total()} problems" if ledger.counts else "clean")
    return 1 if ledger.counts else 0


if __name__ == "__main__":
    sys.exit(main())
