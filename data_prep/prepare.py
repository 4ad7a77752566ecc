"""Command: media files and their texts to training shards, on the cores of a machine or of a Ray cluster, resumable."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

from data_prep.output import PrepareError, explain, held
from data_prep.parallel import run_here, run_in_processes
from data_prep.sources import licences, open_source
from data_prep.sources.arguments import add_source_arguments, check_source_arguments
from data_prep.unit import Job, Unit, finished, units, write_json

DESCRIPTION = """Turn media files and their texts into training shards.

Reads a JSONL manifest, or a data set's files as they are published, decodes each video at one frame a second (at most
--max-frames, evenly spaced beyond), scales and crops, and writes shard-000000.tar with its index, and summary.json:
what was written, what was skipped and why, and the licences. Run again, it goes on where an earlier run stopped,
however that ended, and repeats no finished shard.

examples:
  python -m data_prep.prepare --source folder --input data/clips --manifest train.jsonl --out data/shards/train
  python -m data_prep.prepare --source cauldron --input the_cauldron --out data/shards/cauldron
  python -m data_prep.prepare --source webvid --input annotations --media media/webvid --out data/shards/webvid
  python -m data_prep.prepare --source openvid --input /share/openvid --out /share/shards/openvid --executor ray

With --executor ray every core of a Ray cluster prepares shards, the same byte for byte. Annotations, media, --out and
the current folder must lie on a file system that all its machines see at the same paths.

docs/data.md says what each source expects to find where. Exit codes: 0 done (rows may have been skipped), 1 failed or
no sample written, 2 wrong usage, 75 interrupted: run again to go on.
"""
INTERRUPTED = 75


def prepare(
    source,
    out: Path,
    *,
    size: int,
    tokenizer: str,
    max_frames: int,
    samples_per_shard: int,
    workers: int | None,
    ray_address: str | None = None,
) -> dict:
    """Prepare every row of a source into `out` and return the summary that `summary.json` there holds.

    `workers` = 0 works in this process. With `ray_address` ("auto", "local" or "host:port") the work is done on that
    Ray cluster, by `workers` tasks at once or (None) one a core. Raises PrepareError if `out` holds something else or
    another run works there; OSError, with the file, where one cannot be written.
    """
    job = Job(out=out, size=size, max_frames=max_frames, tokenizer=tokenizer, samples_per_shard=samples_per_shard)
    run = _executor(job, workers, ray_address)
    with held(job, source):
        records, begun, made, skipped = {}, time.monotonic(), Counter(), 0
        with tqdm(total=source.count(), unit="row", desc="prepare", smoothing=0) as bar:

            def todo() -> Iterator[Unit]:
                for unit in units(source.rows(), samples_per_shard):
                    record = finished(job, unit)
                    if record is None:
                        yield unit
                    else:
                        records[unit.number] = record
                        _skip_ahead(bar, len(unit.rows))

            for unit, record in run(todo(), bar.update):
                records[unit.number] = record
                skipped += len(record["skipped"])
                made.update(shards=1, rows=len(unit.rows), clips=record["by_kind"].get("video", 0))
                bar.set_postfix(shards=len(records), skipped=skipped)
        summary = _summary(records[number] for number in sorted(records))
        write_json(out / "summary.json", summary)
    _report(made, len(records) - made["shards"], time.monotonic() - begun)
    return summary


def _executor(job: Job, workers: int | None, ray_address: str | None) -> Callable:
    """A function of (units to do, progress) that gives every unit with its record as it is done."""
    if ray_address is not None:
        try:
            from data_prep.executor_ray import run_on_ray
        except ModuleNotFoundError as error:
            raise PrepareError(
                f"--executor ray: {error}; install Ray (pip install -c constraints.txt -e '.[ray]'), "
                f"or take --executor local"
            ) from error
        return lambda todo, progress: run_on_ray(job, todo, ray_address, workers, progress)
    if workers == 0:
        return lambda todo, progress: run_here(job, todo, progress)
    return lambda todo, progress: run_in_processes(job, todo, workers or len(os.sched_getaffinity(0)), progress)


def _skip_ahead(bar: tqdm, rows: int) -> None:
    """Rows of an earlier run: done, and no part of this run's rate and remaining time."""
    bar.initial += rows
    bar.n += rows
    bar.refresh()


def _report(made: Counter, kept: int, seconds: float) -> None:
    rate = f"{made['rows'] / seconds:.1f} rows/s, {made['clips'] / seconds:.1f} clips/s"
    done = f"{made['shards']} shards made, {kept} finished before"
    print(f"{done}; {made['rows']} rows with {made['clips']} clips in {seconds:.1f} s: {rate}", file=sys.stderr)


def _summary(records: Iterable[dict]) -> dict:
    counts, by_source, by_kind, reasons, skipped, warnings = Counter(), Counter(), Counter(), Counter(), [], []
    for record in records:
        counts.update(samples=record["samples"], frames=record["frames"], shards=int(record["samples"] > 0))
        by_source.update(record["by_source"])
        by_kind.update(record["by_kind"])
        reasons.update(row["reason"] for row in record["skipped"])
        skipped += record["skipped"]
        warnings += record["warnings"]
    return {
        **{name: counts[name] for name in ("samples", "frames", "shards")},
        "by_source": dict(sorted(by_source.items())),
        "licences": licences(sorted(by_source)),
        "by_kind": dict(sorted(by_kind.items())),
        "skipped": len(skipped),
        "skipped_by_reason": dict(reasons.most_common()),
        "skipped_rows": skipped,
        "warnings": warnings,
    }


def _print(summary: dict, out: Path) -> None:
    kinds = ", ".join(f"{count} {kind}" for kind, count in summary["by_kind"].items()) or "none"
    print(f"{summary['samples']} samples ({kinds}), {summary['frames']} frames, {summary['shards']} shards in {out}")
    for source, count in summary["by_source"].items():
        print(f"  {count:8d}  {source} ({summary['licences'][source]['licence']})")
    for warning in summary["warnings"][:10]:
        print(f"  warning  {warning['key']}  {warning['file']}: {warning['detail']}")
    if summary["skipped"]:
        print(f"skipped {summary['skipped']} rows:")
        for reason, count in summary["skipped_by_reason"].items():
            print(f"  {count:8d}  {reason}")
        for row in summary["skipped_rows"][:20]:
            print(f"  skipped  {row['key']}  {row['reason']}: {row['detail']}")
    print(f"details: {out / 'summary.json'}")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.prepare",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_source_arguments(parser)
    parser.add_argument("--media", type=Path, metavar="DIR", help="folder of the media, where they lie elsewhere")
    parser.add_argument("--out", type=Path, required=True, metavar="SHARDS", help="folder to write")
    parser.add_argument("--size", type=_positive, default=224, help="width and height of frames (default 224)")
    parser.add_argument("--tokenizer", default="tiny", help="tiny, a Hugging Face id or a folder (default tiny)")
    parser.add_argument("--max-frames", type=_positive, default=64, help="most frames of a video (default 64)")
    parser.add_argument("--samples-per-shard", type=_positive, default=1000, help="rows a shard (default 1000)")
    parser.add_argument(
        "--executor",
        choices=("local", "ray"),
        default="local",
        help="local: processes on this machine (default); ray: a Ray cluster whose nodes share a file system",
    )
    parser.add_argument(
        "--ray-address",
        type=_address,
        metavar="WHERE",
        help="auto: the cluster this machine is in (default); local: one on this machine for this run; or host:port",
    )
    parser.add_argument("--workers", type=_positive, help="processes, or tasks of a cluster (default: one a core)")
    asked = parser.parse_args(arguments)
    check_source_arguments(parser, asked)
    if asked.executor == "ray":
        asked.ray_address = asked.ray_address or "auto"
    elif asked.ray_address:
        parser.error(f"--ray-address {asked.ray_address}: expected --executor ray with it")
    return asked


def _address(text: str) -> str:
    host, _, port = text.rpartition(":")
    if text not in ("auto", "local") and not (host and port.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text}: expected auto, local or host:port")
    return text


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected 1 or more")
    return value


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0 done, 1 failed or nothing written, 2 wrong usage, 75 interrupted."""
    asked = parse(arguments)
    names = ("size", "tokenizer", "max_frames", "samples_per_shard", "workers", "ray_address")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a process a core is parallel enough
    try:
        source = open_source(asked.source, asked.input, asked.manifest, asked.media)
        summary = prepare(source, asked.out, **{name: getattr(asked, name) for name in names})
    except KeyboardInterrupt:
        print("interrupted; run again to go on", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        print(f"error: {explain(error, asked.out)}", file=sys.stderr)
        return 1
    except (PrepareError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    _print(summary, asked.out)
    if not summary["samples"]:
        print(f"error: no sample could be written from {asked.manifest or asked.input}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ended by the system as by Ctrl-C
    sys.exit(main())
