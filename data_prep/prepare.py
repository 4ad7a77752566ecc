"""Command: media files and their texts to training shards, in parallel processes, going on where it stopped."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from data_prep.parallel import run_here, run_in_processes
from data_prep.sources import licences, open_source
from data_prep.sources.arguments import add_source_arguments, check_source_arguments
from data_prep.unit import RECORDS, Job, finished, units, write_json
from fvlm.data.chat import load_tokenizer, tokenizer_hash

DESCRIPTION = """Turn media files and their texts into training shards.

Reads a JSONL manifest, or a data set's files as they are published, decodes each video at one frame a second (at most
--max-frames, evenly spaced beyond), scales and crops, and writes shard-000000.tar with its index, and summary.json:
what was written, what was skipped and why, and the licences. Run again, it goes on where an earlier run stopped.

examples:
  python -m data_prep.prepare --source folder --input data/clips --manifest train.jsonl --out data/shards/train
  python -m data_prep.prepare --source cauldron --input the_cauldron --out data/shards/cauldron
  python -m data_prep.prepare --source webvid --input annotations --media media/webvid --out data/shards/webvid

docs/data.md says what each source expects to find where.
"""


class PrepareError(Exception):
    """The request cannot be carried out; the message says what to change."""


def prepare(
    source, out: Path, *, size: int, tokenizer: str, max_frames: int, samples_per_shard: int, workers: int
) -> dict:
    """Prepare every row of a source into `out` and return the summary that `summary.json` there holds.

    `workers` = 0 works in this process. Raises PrepareError if `out` holds something else.
    """
    job = Job(out=out, size=size, max_frames=max_frames, tokenizer=tokenizer, samples_per_shard=samples_per_shard)
    _claim(job, source)
    for leftover in out.glob(".shard-*.tmp"):  # of a run that was killed
        leftover.unlink(missing_ok=True)
    records = {}
    with tqdm(total=source.count(), unit="row", desc="prepare") as bar:

        def todo():
            for unit in units(source.rows(), samples_per_shard):
                record = finished(job, unit)
                if record is None:
                    yield unit
                else:
                    records[unit.number] = record
                    bar.update(len(unit.rows))

        run = run_in_processes(job, todo(), workers, bar.update) if workers else run_here(job, todo(), bar.update)
        for unit, record in run:
            records[unit.number] = record
            bar.set_postfix(skipped=sum(len(each["skipped"]) for each in records.values()))
    summary = _summary(records[number] for number in sorted(records))
    write_json(out / "summary.json", summary)
    return summary


def _claim(job: Job, source) -> None:
    """Note in the output folder what it is made from, or check that it is the same as before."""
    request = {
        "rows": source.digest(),
        "tokenizer": tokenizer_hash(load_tokenizer(job.tokenizer)),
        "size": job.size,
        "max_frames": job.max_frames,
        "samples_per_shard": job.samples_per_shard,
    }
    note = job.out / RECORDS / "request.json"
    if note.exists():
        before = json.loads(note.read_text())
        changed = [
            f"{name} {before.get(name)} -> {value}" for name, value in request.items() if before.get(name) != value
        ]
        if changed:
            raise PrepareError(
                f"{job.out} holds shards of another request ({', '.join(changed)}): "
                f"give another --out, or remove the folder to prepare anew"
            )
    elif any(job.out.glob("*.tar")):
        raise PrepareError(f"{job.out} holds tar files that this command did not write; give another --out")
    else:
        write_json(note, request)


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
    parser.add_argument(
        "--prompts",
        choices=("recipe", "varied"),
        default="recipe",
        help="what asks for captions: the recipe's one prompt a source (default), or one of several by the row's key",
    )
    parser.add_argument("--size", type=_positive, default=224, help="width and height of frames (default 224)")
    parser.add_argument("--tokenizer", default="tiny", help="tiny, a Hugging Face id or a folder (default tiny)")
    parser.add_argument("--max-frames", type=_positive, default=64, help="most frames of a video (default 64)")
    parser.add_argument("--samples-per-shard", type=_positive, default=1000, help="rows a shard (default 1000)")
    parser.add_argument("--workers", type=_positive, default=os.cpu_count(), help="processes (default: one a core)")
    asked = parser.parse_args(arguments)
    check_source_arguments(parser, asked)
    if asked.source == "folder" and asked.prompts == "varied":
        parser.error("--prompts varied: a manifest brings its own user texts; write them there")
    return asked


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected 1 or more")
    return value


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0 done (rows may have been skipped), 1 failed or nothing written, 2 wrong usage."""
    asked = parse(arguments)
    settings = {
        name: getattr(asked, name) for name in ("size", "tokenizer", "max_frames", "samples_per_shard", "workers")
    }
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a process a core is parallel enough
    try:
        source = open_source(asked.source, asked.input, asked.manifest, asked.media, asked.prompts == "varied")
        summary = prepare(source, asked.out, **settings)
    except (PrepareError, OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    _print(summary, asked.out)
    if not summary["samples"]:
        print(f"error: no sample could be written from {asked.manifest or asked.input}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
