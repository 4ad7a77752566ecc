"""Command: our loader against webdataset with Pillow, and MosaicML Streaming, on the same samples in the same run."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks import dataloader_ours
from benchmarks.dataloader_rivals import STREAMING, WRITE
from benchmarks.dataloader_samples import SAMPLES_PER_SHARD, draw_set
from benchmarks.environment import RESULTS, ROOT, fail, markdown_table, processor_slug, record, write_json
from benchmarks.timing import summary

DESCRIPTION = """Time our loader against two others, from files to finished batches, on samples like those of stage 2.

  webdataset      what one writes first: webdataset, Pillow, a padded batch
  streaming       MosaicML Streaming on MDS shards of the same samples, its own picture type, a padded batch
  streaming_lean  the same with our JPEG decoder and no padding: the loader alone

Every measurement is a process of its own on warm files, one thread a process; loaders take turns, another one first in
each round. Figures are medians (p20-p80). *Per core* counts the processor time of a process and all its workers, so
that it holds on a busy machine too; the speed-ups are ratios of it, round by round, and the headline is the lowest over
the numbers of workers. MosaicML Streaming's dependencies are at odds with ours: name the Python of an environment that
has it (pip install mosaicml-streaming webdataset simplejpeg psutil), or it is left out, with a note.

--soak reads that many small packs instead and says how much memory a worker has resident; exit code 1 if it grows.

examples:
  python -m benchmarks.dataloader --rival-python streaming-env/bin/python
  python -m benchmarks.dataloader --workers 0 4 8 --rounds 9
  python -m benchmarks.dataloader --soak 20000 --workers 2
writes benchmarks/results/dataloader-<machine>.json (dataloader-soak-<machine>.json)
"""
MODULE = "benchmarks.dataloader"
ASKED = {"webdataset": 3.0, "streaming": 1.2, "streaming_lean": 1.2}
"""Speed-ups that the project promises."""
SOAK_TOKENS = 1024
"""Of a pack of the long run."""
_LEAST = 4 * SAMPLES_PER_SHARD  # else a worker may have no shard, and batches are too few to time


def run_process(python: str, module: str, arguments: Sequence[Any]) -> str:
    """Standard output of `python -m module`, with this repository importable. Raises RuntimeError if it fails."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [python, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}, its message is above")
    return done.stdout


class Comparison:
    """Rounds of all loaders on one folder of samples."""

    def __init__(self, folder: Path, num_samples: int, rival_python: str | None):
        self._reading = [folder, "--warm-up", num_samples // 8, "--samples", num_samples * 3 // 4]
        self._rival_python, self._folder = rival_python, folder
        self.loaders = ["ours", "webdataset"]
        self.found: dict[tuple[str, int], list[dict[str, float]]] = {}
        """(loader, workers) -> figures of each round."""
        self.versions: dict[str, dict[str, str]] = {}
        self.notes: list[str] = []

    def add_streaming(self) -> None:
        """Have MosaicML Streaming take part, if there is a Python that can import it."""
        python = self._rival_python or sys.executable
        probe = subprocess.run([python, "-c", "import streaming"], capture_output=True, text=True, check=False)
        if probe.returncode:
            last = probe.stderr.strip().splitlines()[-1:]
            self.notes.append(f"without MosaicML Streaming: {python}: {' '.join(last)} (--help says how to have it)")
            return
        self._rival_python = python
        run_process(python, "benchmarks.dataloader_rivals", [self._folder, WRITE])
        self.loaders += STREAMING

    def round(self, number: int, workers: Sequence[int], bar: tqdm) -> None:
        """One measurement of each loader with each number of workers."""
        turn = number % len(self.loaders)
        for num_workers in workers:
            for loader in self.loaders[turn:] + self.loaders[:turn]:
                figures = self._measure(loader, num_workers)
                if "versions" in figures:
                    self.versions[loader] = figures.pop("versions")
                self.found.setdefault((loader, num_workers), []).append(figures)
                bar.update()

    def _measure(self, loader: str, num_workers: int) -> dict[str, Any]:
        python = self._rival_python if loader in STREAMING else sys.executable
        module = "benchmarks.dataloader_ours" if loader == "ours" else "benchmarks.dataloader_rivals"
        which = [] if loader == "ours" else [loader]
        out = run_process(python, module, [*self._reading, *which, "--workers", num_workers])
        return json.loads(out.splitlines()[-1])

    def figures(self) -> dict[str, float]:
        """Flat: what was measured as `loader/workers=n/...`, `speedup_loader/workers=n`, and `speedup_loader`."""
        figures: dict[str, float] = {}
        for (loader, num_workers), rounds in self.found.items():
            for name in rounds[0]:
                values = [each[name] for each in rounds]
                figures |= spread(f"{loader}/workers={num_workers}/{name}", values)
        for loader in self.loaders[1:]:
            lowest = []
            for (other, num_workers), rounds in self.found.items():
                if other == loader:
                    ratios = speedups(self.found["ours", num_workers], rounds)
                    figures |= (found := spread(f"speedup_{loader}/workers={num_workers}", ratios))
                    lowest.append(next(iter(found.values())))
            figures[f"speedup_{loader}"] = min(lowest)
        return figures


def speedups(ours: Sequence[dict[str, float]], theirs: Sequence[dict[str, float]]) -> list[float]:
    """Samples a second of one core, ours over theirs, in each round."""
    name = "samples_per_core_s"
    return [mine[name] / other[name] for mine, other in zip(ours, theirs, strict=True)]


def spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """Median, p20 and p80 as figures."""
    found = summary(values)
    return {name: found.median, f"{name}_p20": found.p20, f"{name}_p80": found.p80}


def rows(comparison: Comparison, figures: dict[str, float]) -> list[dict[str, Any]]:
    """The table that people read."""

    def shown(key: str, digits: int = 0) -> str:
        return f"{figures[key]:.{digits}f} ({figures[key + '_p20']:.{digits}f}-{figures[key + '_p80']:.{digits}f})"

    table = []
    for loader, num_workers in sorted(comparison.found, key=lambda each: each[1]):
        key = f"{loader}/workers={num_workers}"
        table.append(
            {
                "workers": num_workers,
                "loader": loader,
                "samples/s": shown(f"{key}/samples_per_s"),
                "frames/s": shown(f"{key}/frames_per_s"),
                "packs or batches/s": shown(f"{key}/batches_per_s", 2),
                "samples/s per core": shown(f"{key}/samples_per_core_s"),
                "frames/s per core": shown(f"{key}/frames_per_core_s"),
                "MiB a process, own": f"{figures[f'{key}/resident_mib']:.0f}, {figures[f'{key}/own_mib']:.0f}",
                "ours is faster": None if loader == "ours" else shown(f"speedup_{key}", 2),
            }
        )
    return table


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rival-python", metavar="FILE", help="Python that has MosaicML Streaming (default: this one)")
    parser.add_argument("--workers", type=int, nargs="+", help="numbers of workers (default 0 1 2; --soak: 2)")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each (default 5)")
    parser.add_argument("--samples", type=int, default=4096, help=f"to draw, at least {_LEAST} (default 4096)")
    parser.add_argument("--size", type=int, default=224, help="pixels of a frame's side (default 224)")
    parser.add_argument("--scratch", type=Path, help="folder for the samples, 1 MB each (default: the system's)")
    parser.add_argument("--soak", type=int, metavar="PACKS", help="memory over this many packs, instead of speed")
    parser.add_argument("--json", type=Path, help="file to write (default: see above)")
    asked = parser.parse_args(arguments)
    if asked.samples < _LEAST or asked.rounds < 1 or (asked.soak is not None and asked.soak < 4):
        parser.error(f"expected --samples of at least {_LEAST}, --rounds of at least 1, --soak of at least 4")
    if asked.soak and asked.workers and len(asked.workers) > 1:
        parser.error("expected one number of --workers with --soak")
    return asked


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 done, 1 a measurement failed or memory grew, 2 wrong usage."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    asked = parse(arguments)
    with tempfile.TemporaryDirectory(prefix="dataloader-", dir=asked.scratch) as scratch:
        drawn = draw_set(Path(scratch), asked.samples, asked.size)
        print(f"{drawn.samples} samples, {drawn.frames} frames of {drawn.jpeg_bytes} bytes on average", flush=True)
        try:
            return (_soak if asked.soak else _compare)(asked, arguments, Path(scratch), {"set": asdict(drawn)})
        except RuntimeError as error:
            return fail(str(error))


def _compare(asked: argparse.Namespace, arguments: Sequence[str], folder: Path, more: dict[str, Any]) -> int:
    comparison, workers = Comparison(folder, asked.samples, asked.rival_python), asked.workers or [0, 1, 2]
    comparison.add_streaming()
    print("\n".join(f"note: {note}" for note in comparison.notes), flush=True)
    file = asked.json or RESULTS / f"dataloader-{processor_slug()}.json"
    with tqdm(total=asked.rounds * len(workers) * len(comparison.loaders), desc="measuring", disable=None) as bar:
        for number in range(asked.rounds):
            comparison.round(number, workers, bar)
            figures = comparison.figures()
            about = more | {"notes": comparison.notes, "rival_versions": comparison.versions, "rounds": number + 1}
            write_json(file, record(MODULE, arguments, figures, **about))  # each round: a late failure costs little
    print(markdown_table(rows(comparison, figures)) + "\n")
    for loader in comparison.loaders[1:]:
        print(f"{figures[f'speedup_{loader}']:.2f} times as fast per core as {loader} (at least {ASKED[loader]} asked)")
    print(f"written to {file}")
    return 0


def _soak(asked: argparse.Namespace, arguments: Sequence[str], folder: Path, more: dict[str, Any]) -> int:
    [num_workers] = asked.workers or [2]
    reading = [folder, "--workers", num_workers, "--soak", asked.soak, "--tokens", SOAK_TOKENS]
    figures = json.loads(run_process(sys.executable, "benchmarks.dataloader_ours", reading).splitlines()[-1])
    file = asked.json or RESULTS / f"dataloader-soak-{processor_slug()}.json"
    write_json(file, record(MODULE, arguments, figures, **more))
    quarters = ", ".join(f"{figures[f'resident_mib_quarter_{i}']:.1f}" for i in range(1, 5))
    print(
        f"{figures['packs']} packs, {num_workers} workers: at most {figures['resident_mib_most']:.0f} MiB resident in "
        f"one, of which {figures['own_mib_most']:.0f} are its own; resident by quarter of the run {quarters}\n"
        f"written to {file}"
    )
    if not figures["flat"]:
        grown = figures["resident_mib_growth"]
        return fail(f"a worker's resident memory grew by {grown:.1%}, {dataloader_ours.FLAT:.0%} is allowed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
