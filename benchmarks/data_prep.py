"""Command: from video files to JPEG frames, ours against the ffmpeg command line, on the same clips in the same run."""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from benchmarks.data_prep_clips import FPS, Shot, draw_clips
from benchmarks.environment import RESULTS, fail, markdown_table, processor_slug, record, write_json
from benchmarks.timing import summary
from fvlm.data.upright import Shaper
from fvlm.data.video import decode_jpeg, encode_jpeg, frame_times, read_media
from fvlm.data.video_file import VideoFile

DESCRIPTION = """Time the way from 720p H.264 clips to JPEGs of 224 x 224, one a second, by processor time on one core.

  ours      fvlm.data.video as preparation uses it: what a chosen frame needs is decoded
  in_order  the same, but everything up to the last chosen frame is decoded
  ffmpeg    ffmpeg -vf fps=1,scale,crop on one thread, a process a clip; -q:v 2, whose JPEGs are nearest to ours

All three write the same number of files into memory and take turns, beginning with another one each round; files are
warm. Seconds are processor time (user and system) per clip, medians (p20-p80) over rounds. Speed-ups are ratios of it,
round by round, with ffmpeg's start counted in, and once more without (ffmpeg -version); the headline is of all clips
together. Checked first: our frames are those of in_order, bit for bit, and ffmpeg's show the same moments. Clips are
single shots as x264 makes them by default, but for the distance of keyframes (gop).

ffmpeg is what --ffmpeg names, else that of the package imageio-ffmpeg (in the extra `dev`), else the one on PATH.

examples:
  python -m benchmarks.data_prep                      draws 7 clips (minutes), times them (minutes)
  python -m benchmarks.data_prep --clips /tmp/clips   draws them there, or takes those that are there
  python -m benchmarks.data_prep --seconds 5 20 --rounds 3
  python -m benchmarks.data_prep --rehearse           two seconds, once: shows that the command works
writes benchmarks/results/data_prep-<machine>.json
"""
MODULE = "benchmarks.data_prep"
SHOTS = (Shot(5, (250, 48)), Shot(20, (250, 48, 30)), Shot(60, (250, 48)))
REHEARSED = (Shot(2, (250, 15), (320, 180)),)
SIZE = 224
MOST_DIFFERENCE = 3.0
"""Levels on average between our frames and ffmpeg's, which scales a little otherwise; other frames are farther off."""
CONTENDERS = ("ours", "in_order", "ffmpeg")


class Spent(NamedTuple):
    """Seconds."""

    cpu: float
    wall: float


def ours(path: Path, folder: Path) -> None:
    _write(read_media(path, SIZE).frames, folder)


def in_order(path: Path, folder: Path) -> None:
    _write(decode_in_order(path), folder)


def decode_in_order(path: Path, earlier: float = 0.0) -> np.ndarray:
    """The frames of `read_media`, or those so many seconds earlier, all decoded up to the last: uint8 [n, h, w, 3]."""
    with VideoFile(path) as file:
        times = frame_times(file.declared_duration()) - earlier
        return np.stack(file.take(times, Shaper(path, SIZE, file.pixel_aspect))[0])


def _write(frames: np.ndarray, folder: Path) -> None:
    for number, frame in enumerate(frames):
        (folder / f"{number:03d}.jpg").write_bytes(encode_jpeg(frame))


def ffmpeg_command(binary: str, path: Path, folder: Path) -> list[str]:
    """What a person would type for the same frames, on one thread."""
    quiet, one = ["-nostdin", "-v", "error"], ["-threads", "1"]
    picture = ["-vf", f"fps=1,scale=-2:{SIZE}:flags=bicubic,crop={SIZE}:{SIZE}", "-pix_fmt", "yuvj444p", "-q:v", "2"]
    return [binary, *quiet, *one, "-i", str(path), "-an", *picture, *one, "-filter_threads", "1", f"{folder}/%03d.jpg"]


def spend(work: Callable[[], Any], who: int = resource.RUSAGE_SELF) -> Spent:
    """Processor and wall time of `work`, of this process or (`RUSAGE_CHILDREN`) of those it starts and waits for."""
    before, begun = resource.getrusage(who), time.perf_counter()
    work()
    wall, after = time.perf_counter() - begun, resource.getrusage(who)
    return Spent(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, wall)


class Comparison:
    """All contenders on some clips. `memory`: an empty folder for what they write."""

    def __init__(self, binary: str, memory: Path):
        self._binary, self._memory = binary, memory
        self.spent: dict[tuple[str, str], list[Spent]] = {}
        """(clip, contender) -> each round's."""
        self.started: list[Spent] = []
        """What ffmpeg takes to do nothing."""
        self.facts: dict[str, float] = {}

    def run(self, path: Path, contender: str) -> tuple[Spent, list[bytes]]:
        """What it took, and the JPEGs. Raises subprocess.CalledProcessError."""
        with tempfile.TemporaryDirectory(dir=self._memory) as name:
            folder = Path(name)
            if contender == "ffmpeg":
                command = ffmpeg_command(self._binary, path, folder)
                spent = spend(lambda: subprocess.run(command, check=True), resource.RUSAGE_CHILDREN)
            else:
                work = {"ours": ours, "in_order": in_order}[contender]
                spent = spend(lambda: work(path, folder))
            return spent, [file.read_bytes() for file in sorted(folder.iterdir())]

    def check(self, path: Path) -> str | None:
        """What is wrong with the work of the contenders on a clip; warms the file. Notes facts about the clip."""
        frames = read_media(path, SIZE).frames
        if not np.array_equal(frames, decode_in_order(path)):
            return f"{path.name}: our frames are not those of a full decode"
        mine, theirs = (self.run(path, name)[1] for name in ("ours", "ffmpeg"))
        if len(mine) != len(theirs):
            return f"{path.name}: {len(mine)} frames of ours, {len(theirs)} of ffmpeg's"
        expected = decode_in_order(path, earlier=0.5 / FPS)  # of two frames next to a time, ffmpeg takes the first
        shown = np.stack([decode_jpeg(jpeg, SIZE).transpose(1, 2, 0) for jpeg in theirs])
        difference = np.abs(shown.astype(np.int16) - expected).mean(axis=(1, 2, 3))
        self.facts |= {
            f"{path.stem}/frames": len(mine),
            f"{path.stem}/mbit_per_s": path.stat().st_size * 8e-6 / len(mine),
            f"{path.stem}/jpeg_bytes_ours": sum(map(len, mine)) / len(mine),
            f"{path.stem}/jpeg_bytes_ffmpeg": sum(map(len, theirs)) / len(theirs),
            f"{path.stem}/difference_levels": float(difference.max()),
        }
        if difference.max() > MOST_DIFFERENCE:
            return f"{path.name}: frames {difference.max():.1f} levels from ffmpeg's on average"
        return None

    def round(self, paths: Sequence[Path], number: int) -> None:
        """Every contender once on every clip."""
        self.started.append(
            spend(
                lambda: subprocess.run([self._binary, "-version"], stdout=subprocess.DEVNULL, check=True),
                resource.RUSAGE_CHILDREN,
            )
        )
        for path in paths:
            for turn in range(len(CONTENDERS)):
                contender = CONTENDERS[(turn + number) % len(CONTENDERS)]
                self.spent.setdefault((path.stem, contender), []).append(self.run(path, contender)[0])

    def figures(self, paths: Sequence[Path]) -> dict[str, float]:
        """Flat: per clip and contender, then of all clips together."""
        start = summary([each.cpu for each in self.started]).median
        found = {**self.facts, "ffmpeg_start_s": start}
        for path in paths:
            for contender in CONTENDERS:
                spent = self.spent[path.stem, contender]
                found |= spread(f"{path.stem}/{contender}_s", [each.cpu for each in spent])
                found[f"{path.stem}/{contender}_wall_s"] = summary([each.wall for each in spent]).median
            found |= self._speedups(f"{path.stem}/", [path], start)
        for contender in CONTENDERS:
            total = sum(found[f"{path.stem}/{contender}_s"] for path in paths)
            found[f"{contender}_clips_per_s"] = len(paths) / total
        return found | self._speedups("", paths, start)

    def _speedups(self, prefix: str, paths: Sequence[Path], start: float) -> dict[str, float]:
        """Ratios of processor time, round by round, of `paths` together."""
        mine, all_decoded, theirs = (
            np.sum([[each.cpu for each in self.spent[path.stem, contender]] for path in paths], axis=0)
            for contender in CONTENDERS
        )
        return {
            **spread(f"{prefix}speedup", theirs / mine),
            **spread(f"{prefix}speedup_without_start", (theirs - len(paths) * start) / mine),
            **spread(f"{prefix}speedup_over_in_order", all_decoded / mine),
        }


def spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """Median and quantiles, as figures hold them."""
    found = summary(list(values))
    return {name: found.median, f"{name}_p20": found.p20, f"{name}_p80": found.p80}


def rows(paths: Sequence[Path], figures: dict[str, float]) -> list[dict[str, Any]]:
    """The table that is printed."""

    def shown(name: str, digits: int) -> str:
        return f"{figures[name]:.{digits}f} ({figures[name + '_p20']:.{digits}f}-{figures[name + '_p80']:.{digits}f})"

    return [
        {
            "clip": path.stem,
            "Mbit/s": f"{figures[f'{path.stem}/mbit_per_s']:.1f}",
            **{f"{contender}, s": shown(f"{path.stem}/{contender}_s", 3) for contender in CONTENDERS},
            "speed-up": shown(f"{path.stem}/speedup", 2),
            "without ffmpeg's start": shown(f"{path.stem}/speedup_without_start", 2),
        }
        for path in paths
    ]


def find_ffmpeg(named: str | None) -> str | None:
    """Path of an ffmpeg that can be run, or None."""
    if named is not None:
        return shutil.which(named)
    try:
        import imageio_ffmpeg  # not needed where --ffmpeg names one

        return imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError):  # RuntimeError: a package without a binary for this machine
        return shutil.which("ffmpeg")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7, help="timed runs of each (default 7)")
    lengths = [shot.seconds for shot in SHOTS]
    parser.add_argument(
        "--seconds", type=int, nargs="+", choices=lengths, default=lengths, help="lengths (default all)"
    )
    parser.add_argument("--clips", type=Path, help="folder to draw the clips in, kept (default: a temporary one)")
    parser.add_argument("--ffmpeg", metavar="BINARY", help="path or name of another ffmpeg")
    parser.add_argument("--rehearse", action="store_true", help="tiny; writes only where --json says")
    parser.add_argument("--json", type=Path, help=f"file to write (default {RESULTS.name}/data_prep-<machine>.json)")
    asked = parser.parse_args(arguments)
    if asked.rounds < 1:
        parser.error(f"--rounds {asked.rounds}: expected 1 or more")
    return asked


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 done, 1 something missing or a wrong result, 2 wrong usage."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    asked = parse(arguments)
    binary = find_ffmpeg(asked.ffmpeg)
    if binary is None:
        missing = f"{asked.ffmpeg} is no program" if asked.ffmpeg else "no ffmpeg on PATH"
        return fail(f"{missing}: pip install -c constraints.txt imageio-ffmpeg, or name one with --ffmpeg")
    if not hasattr(os, "sched_setaffinity"):
        return fail("processes can be kept to one core on Linux only")
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.clips or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        shots = [shot for shot in SHOTS if shot.seconds in asked.seconds]
        paths = _clips(REHEARSED if asked.rehearse else shots, folder)
        cores = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {max(cores)})  # ffmpeg inherits it
        try:
            return _compare(asked, arguments, binary, paths)
        finally:
            os.sched_setaffinity(0, cores)


def _clips(shots: Sequence[Shot], folder: Path) -> list[Path]:
    paths = []
    for shot in tqdm(shots, desc="drawing clips", unit="shot", file=sys.stderr):
        there = [folder / name for name in shot.names]
        paths += there if all(path.exists() for path in there) else draw_clips(shot, folder, seed=shot.seconds)
    return paths


def _compare(asked: argparse.Namespace, arguments: Sequence[str], binary: str, paths: list[Path]) -> int:
    memory = Path("/dev/shm")
    comparison = Comparison(binary, memory if memory.is_dir() else Path(tempfile.gettempdir()))
    if wrong := [message for path in paths if (message := comparison.check(path))]:
        return fail("\n".join(["not the same work, not timed:", *wrong]))
    rounds = 1 if asked.rehearse else asked.rounds
    for number in tqdm(range(rounds), desc="timing", unit="round", file=sys.stderr):
        comparison.round(paths, number)
    figures = comparison.figures(paths)
    print(markdown_table(rows(paths, figures)))
    rates = ", ".join(f"{contender} {figures[f'{contender}_clips_per_s']:.2f}" for contender in CONTENDERS)
    print(f"\nclips a second on a core: {rates}; speed-up over ffmpeg {figures['speedup']:.2f}")
    file = asked.json or (None if asked.rehearse else RESULTS / f"data_prep-{processor_slug()}.json")
    if file is not None:
        version = subprocess.run([binary, "-version"], capture_output=True, text=True, check=True).stdout.splitlines()[
            0
        ]
        write_json(file, record(MODULE, arguments, figures, rounds=rounds, rehearsal=asked.rehearse, ffmpeg=version))
        print(f"written to {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
