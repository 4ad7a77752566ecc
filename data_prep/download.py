"""Command: the media of a data set that publishes addresses, many at once, going on where it stopped."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import aiohttp
from tqdm import tqdm

from data_prep.download_fetch import DiskError, Fetcher, Limits
from data_prep.download_hosts import DownloadError, Hosts
from data_prep.download_ledger import FOLDER, Ledger
from data_prep.sources import open_source
from data_prep.sources.arguments import add_source_arguments, check_source_arguments
from data_prep.unit import write_json

DESCRIPTION = """Download the media of a data set whose rows give addresses (webvid, or a folder's manifest with `url`).

Files appear under their final name when they are complete and begin as a picture or video does. What could not be had
is listed with its reason in OUT/.download/ledger.jsonl and counted in OUT/.download/summary.json. Run again, it keeps
what is there, continues what had begun, tries again what may have been bad luck, and leaves out what is not to be had.

examples:
  python -m data_prep.download --source webvid --input annotations --out media/webvid
  python -m data_prep.prepare --source webvid --input annotations --media media/webvid --out shards/webvid
"""
INTERRUPTED = 75
_AHEAD = 8  # files waiting for their turn, as a multiple of those at work: what one host holds up, others may use
_USER_AGENT = "fvlm-data-prep"


async def download(
    source,
    out: Path,
    *,
    limits: Limits = Limits(),  # noqa: B008  frozen
    concurrency: int = 64,
    per_host: int = 8,
    again: bool = False,
) -> dict:
    """Download every file of the source's rows, which lie in `out`, and return what `summary.json` there then says.

    `again` asks also for files that an earlier run gave up. Raises DiskError if the disk is full, BlockingIOError if
    another process downloads into `out`.
    """
    with Ledger(out) as ledger, tqdm(total=source.count(), unit="row", desc="download") as bar:
        run = _Run(source, out, ledger, bar, again)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=limits.idle_seconds, sock_read=limits.idle_seconds)
        connector = aiohttp.TCPConnector(limit=0)  # Hosts limits
        async with aiohttp.ClientSession(
            connector=connector, timeout=timeout, headers={"User-Agent": _USER_AGENT}, auto_decompress=False
        ) as session:
            try:
                await run.work(Fetcher(session, Hosts(concurrency, per_host, limits.seconds), limits), concurrency)
            except DiskError:  # it has no room for the summary either
                raise
            except BaseException:
                write_json(out / FOLDER / "summary.json", run.summary())
                raise
    summary = run.summary()
    write_json(out / FOLDER / "summary.json", summary)
    return summary


class _Run:
    """One pass over a source's rows."""

    def __init__(self, source, out: Path, ledger: Ledger, bar: tqdm, again: bool):
        self._source, self._out, self._ledger, self._bar, self._again = source, out, ledger, bar, again
        self._counts: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()
        self._begun = time.monotonic()

    def summary(self) -> dict:
        counts = ("rows", "files", "downloaded", "kept", "failed", "bytes", "rows_refused", "rows_without_url")
        return {
            "source": self._source.NAME,
            **{name: self._counts[name] for name in counts},
            "failed_by_reason": dict(self._reasons.most_common()),
            "seconds": round(time.monotonic() - self._begun, 1),
        }

    async def work(self, fetcher: Fetcher, concurrency: int) -> None:
        """Fetch what is missing."""
        room, at_work = asyncio.Semaphore(_AHEAD * concurrency), set()
        try:
            async with asyncio.TaskGroup() as group:
                for number, (file, url) in enumerate(self._files()):
                    if number % 1000 == 0:
                        await asyncio.sleep(0)  # files that are there already must not hold up those on their way
                    if file in at_work:  # another row's, too
                        self._bar.update()
                        continue
                    if not self._missing(file, url):
                        continue
                    await room.acquire()
                    at_work.add(file)
                    task = group.create_task(self._one(fetcher, file, url))
                    task.add_done_callback(lambda _, file=file: (at_work.discard(file), room.release()))
        except ExceptionGroup as errors:
            disk, _ = errors.split((DiskError, OSError))
            raise disk.exceptions[0] if disk else errors from None

    def _files(self) -> Iterator[tuple[str, str]]:
        """(file inside `out`, address) of every row that has both."""
        for row in self._source.rows():
            self._counts["rows"] += 1
            if row.refused or not row.urls:
                self._counts["rows_refused"] += int(row.refused is not None)
                self._counts["rows_without_url"] += int(row.refused is None and bool(row.media))
                self._bar.update()
                continue
            self._bar.total += len(row.urls) - 1  # it counts files, and began with the rows
            for media, url in zip(row.media, row.urls, strict=True):
                self._counts["files"] += 1
                yield os.path.relpath(os.path.normpath(media), self._out), url

    def _missing(self, file: str, url: str) -> bool:
        """Whether a file is to be asked for; counted if it is not."""
        if os.path.isfile(self._out / file):  # not Path's, which fails on a name that is too long
            self._done("kept")
        elif file.startswith(".."):
            self._failed(file, url, DownloadError("outside", f"{file}: not in the folder --out"))
        elif not self._again and (reason := self._ledger.given_up(file)):
            self._reasons[reason] += 1
            self._done("failed")
        else:
            return True
        return False

    async def _one(self, fetcher: Fetcher, file: str, url: str) -> None:
        try:
            size = await fetcher.fetch(url, self._out / file)
        except DownloadError as error:
            self._failed(file, url, error)
            return
        self._ledger.add({"file": file, "url": url, "bytes": size})
        self._counts["bytes"] += size
        self._done("downloaded")

    def _failed(self, file: str, url: str, error: DownloadError) -> None:
        self._reasons[error.reason] += 1
        self._ledger.add(
            {"file": file, "url": url, "reason": error.reason, "detail": error.detail, "final": error.final}
        )
        self._done("failed")

    def _done(self, outcome: str) -> None:
        self._counts[outcome] += 1
        self._bar.set_postfix(failed=self._counts["failed"], mb=self._counts["bytes"] >> 20, refresh=False)
        self._bar.update()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.download",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_source_arguments(parser)
    usual = Limits()
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the media")
    parser.add_argument("--concurrency", type=_positive(int), default=64, help="files at once (default 64)")
    parser.add_argument("--per-host", type=_positive(int), default=8, help="files at once from one host (default 8)")
    parser.add_argument("--attempts", type=_positive(int), default=usual.attempts, help="for a file (default 5)")
    parser.add_argument("--redirects", type=_positive(int), default=usual.redirects, help="followed (default 5)")
    parser.add_argument(
        "--max-mb", type=_positive(float), default=usual.max_bytes / 2**20, help="largest file, MiB (default 1024)"
    )
    parser.add_argument(
        "--seconds", type=_positive(float), default=usual.seconds, help="most time for a file (default 600)"
    )
    parser.add_argument(
        "--idle-seconds", type=_positive(float), default=usual.idle_seconds, help="longest silence (default 30)"
    )
    parser.add_argument("--again", action="store_true", help="ask also for files that an earlier run gave up")
    asked = parser.parse_args(arguments)
    check_source_arguments(parser, asked)
    return asked


def _positive(kind: type) -> Callable[[str], float]:
    def convert(text: str) -> float:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{text}: expected more than 0")
        return value

    convert.__name__ = kind.__name__  # as argparse names it where it is not a number
    return convert


async def _main(asked: argparse.Namespace) -> dict:
    task = asyncio.current_task()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    limits = Limits(
        max_bytes=int(asked.max_mb * 2**20),
        seconds=asked.seconds,
        idle_seconds=asked.idle_seconds,
        attempts=asked.attempts,
        redirects=asked.redirects,
    )
    source = open_source(asked.source, asked.input, asked.manifest, media=asked.out)
    return await download(
        source, asked.out, limits=limits, concurrency=asked.concurrency, per_host=asked.per_host, again=asked.again
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0 done (files may have failed), 1 failed or no file there, 2 wrong usage, 75 interrupted."""
    asked = parse(arguments)
    try:
        summary = asyncio.run(_main(asked))
    except asyncio.CancelledError:
        print("interrupted; run again to go on", file=sys.stderr)
        return INTERRUPTED
    except (DiskError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(", ".join(f"{summary[name]} {name}" for name in ("files", "downloaded", "kept", "failed")))
    for reason, count in summary["failed_by_reason"].items():
        print(f"  {count:8d}  {reason}")
    print(f"details: {asked.out / FOLDER / 'ledger.jsonl'}")
    if summary["downloaded"] + summary["kept"]:
        return 0
    if summary["files"]:
        print("error: no file could be downloaded", file=sys.stderr)
    else:
        print(f"error: no row of source {asked.source} gives an address", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
