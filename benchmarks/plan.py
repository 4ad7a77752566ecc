"""Command: how fast packs are planned over a large data set, and in how much memory."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.environment import RESULTS, ROOT, fail, markdown_table, processor_slug, record, write_json
from benchmarks.plan_index import draw
from benchmarks.plan_work import PLANNED

DESCRIPTION = """Plan packs over a synthetic index with the stage-2 distribution; a fresh process for every figure.

The index is drawn into --folder where it is not there yet (4.3 million samples: 0.9 GB, 43 million: 9 GB; minutes): the
.idx files of shards, beside empty tars. Timed is all that a run does between its configuration and its first packs, on
one core: finding shards, opening the table, proposing capacities, planning a step. Not timed: Python's start and
imports. A first start makes the table, which a data set gets once; a cold one finds the table's pages on disk only.

Private memory is what only this process has (RssAnon, every 20 ms), Python and its packages included. What is
resident beyond it are pages of files, the table's among them, which the system takes back when it needs them.

examples:
  python -m benchmarks.plan --folder /data/plan
  python -m benchmarks.plan --folder /tmp/plan --samples 100000 --json /tmp/plan.json
"""
SIZES = [4_300_000, 43_000_000]
LIMITS: dict[str, tuple[Callable[[float], bool], str]] = {
    "first_pack_s": (lambda value: value < 5, "< 5"),
    "resume_s_max": (lambda value: value < 5, "< 5"),
    "private_mib_max": (lambda value: value < 2048, "< 2048"),
    "samples_per_s": (lambda value: value >= 20_000, ">= 20 000"),
    "fill_frames": (lambda value: value >= 0.97, ">= 0.97"),
    "fill_tokens": (lambda value: value >= 0.99, ">= 0.99"),
}
"""Figure of each size -> whether a value will do, and in words."""
_ONE_CORE = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


def measure(folder: Path, num_samples: int, seed: int, resumes: int) -> dict[str, float]:
    """All figures of a size."""
    index = draw(folder, num_samples, seed)
    cache = folder / f"cache-{num_samples}-{seed}"
    shutil.rmtree(cache, ignore_errors=True)
    with tqdm(total=4 + resumes, desc=f"{num_samples:,} samples", file=sys.stderr) as bar:

        def run(seed: int | None = None, planned: int = 0) -> dict[str, float]:
            found = _in_fresh_process({"folder": str(index), "cache": str(cache), "seed": seed, "planned": planned})
            bar.update()
            return found

        first_start = run()
        first = run()
        resumed = [run(number) for number in range(resumes)]
        _forget(cache)
        cold = run(resumes)
        rate = run(resumes + 1, planned=min(PLANNED, num_samples // 2))
    every = [first_start, first, *resumed, cold, rate]
    return {
        "shards": first["shards"],
        "table_mib": sum(path.stat().st_size for path in cache.rglob("*") if path.is_file()) / (1 << 20),
        "first_start_s": first_start["first_pack_s"],
        "first_start_cpu_s": first_start["first_pack_cpu_s"],
        "first_pack_s": first["first_pack_s"],
        "first_pack_cpu_s": first["first_pack_cpu_s"],
        "first_pack_table_s": first["table_s"],
        "first_pack_propose_s": first["propose_s"],
        "resume_s_median": statistics.median(found["first_pack_s"] for found in resumed),
        "resume_s_max": max(found["first_pack_s"] for found in resumed),
        "resume_cpu_s_max": max(found["first_pack_cpu_s"] for found in resumed),
        "resume_cold_s": cold["first_pack_s"],
        "private_mib_max": max(found["private_mib"] for found in every),
        "private_growth_mib_first_start": first_start["private_growth_mib"],
        "private_growth_mib_max": max(found["private_growth_mib"] for found in every),
        "resident_mib_max": max(found["resident_mib"] for found in every),
        **{name: value for name, value in rate.items() if name.startswith(("samples_per", "fill"))},
    }


def _in_fresh_process(arguments: dict[str, Any]) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.plan_work", json.dumps(arguments)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | _ONE_CORE, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _forget(cache: Path) -> None:
    """Have the system drop its copies of the table's pages from memory."""
    os.sync()
    for path in (path for path in cache.rglob("*") if path.is_file()):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plan", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="where indexes and tables lie, and stay")
    parser.add_argument("--samples", type=float, nargs="+", default=SIZES, help="default 4.3e6 43e6")
    parser.add_argument("--resumes", type=int, default=5, help="random places to resume at (default 5)")
    parser.add_argument("--seed", type=int, default=0, help="of the index (default 0)")
    parser.add_argument("--json", type=Path, help="file to write (default benchmarks/results/plan-<machine>.json)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 done, whether limits are kept or not, 1 failed, 2 wrong usage."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    asked = parse(arguments)
    sizes = [int(size) for size in asked.samples]
    if min(sizes) < 20_000 or asked.resumes < 1:
        return fail("expected sizes of at least 20 000 samples, and a place to resume at")
    file = asked.json or RESULTS / f"plan-{processor_slug()}.json"
    figures, rows = {}, []
    for size in sizes:
        try:
            found = measure(asked.folder, size, asked.seed, asked.resumes)
        except (OSError, subprocess.CalledProcessError) as error:
            return fail(f"{size:,} samples: {error}")
        name = f"{size / 1e6:g}M"
        figures |= {f"{name}/{key}": value for key, value in found.items()}
        for key, value in found.items():
            does, wanted = LIMITS.get(key, (None, None))
            kept = None if does is None else "kept" if does(value) else "MISSED"
            rows.append({"samples": name, "figure": key, "value": f"{value:,.4g}", "limit": wanted, "": kept})
        write_json(file, record("benchmarks.plan", arguments, figures, limits={k: v for k, (_, v) in LIMITS.items()}))
    print(markdown_table(rows))
    print(f"\nwritten to {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
