"""Command: a fixed validation set, drawn from shards by seed and source share; training leaves it out by content."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from data_prep.unit import write_json
from fvlm.data.chat import load_tokenizer
from fvlm.data.clip import Clip
from fvlm.data.content import contents_digest, occurs, salted
from fvlm.data.errors import MediaError, SampleError
from fvlm.data.shard import ShardIndex, ShardReader, ShardWriter, find_shards, load_index
from fvlm.data.video import jpeg_pixels, jpeg_size

DESCRIPTION = """Draw a fixed validation set from training shards.

Every source gives its share of the set, at least one sample. The seed and what the samples show and say decide which,
so the set changes neither with the order nor with the number of the shards, and no two samples of it are the same.
They are copied into new shards; the training shards stay as they are. A run whose data.val names the set leaves out
every training sample that is in it by content.

example:
  python -m data_prep.validation --shards shards/train --out shards/val --samples 1000 --seed 0
"""
RECORD = "validation.json"

logger = logging.getLogger(__name__)


class ValidationError(Exception):
    """The set cannot be drawn as asked; the message says what to change."""


@dataclass(frozen=True, slots=True)
class Stock:
    """All samples to draw from, shard by shard."""

    shards: list[Path]
    first: np.ndarray
    """int64 [shards + 1]: shard i has samples first[i] : first[i + 1] of the next two."""
    content: np.ndarray
    """uint64 [n]."""
    source: np.ndarray
    """int16 [n]: position in `source_names`."""
    source_names: list[str]
    """Sorted."""

    @classmethod
    def read(cls, shards: list[Path], tokenizer: PreTrainedTokenizerBase, cache_dir: Path | None) -> Stock:
        """Raises ValueError or OSError as `load_index` does."""
        contents, sources, seen = [], [], {}
        for path in tqdm(shards, unit="shard", desc="read indexes"):
            index = load_index(path, tokenizer, cache_dir)
            contents.append(index.content)
            numbers = np.array([seen.setdefault(name, len(seen)) for name in index.source_names], np.int16)
            sources.append(numbers[index.source])
        names = sorted(seen)
        renumber = np.zeros(len(seen), np.int16)
        renumber[[seen[name] for name in names]] = np.arange(len(seen))
        first = np.cumsum([0, *map(len, contents)])
        return cls(shards, first, np.concatenate(contents), renumber[np.concatenate(sources)], names)

    def distinct(self) -> tuple[np.ndarray, np.ndarray]:
        """Every content once, ascending, and its source: of several, the first by name."""
        order = np.lexsort((self.source, self.content))
        content = self.content[order]
        is_first = np.ones(len(content), np.bool_)
        is_first[1:] = content[1:] != content[:-1]
        return content[is_first], self.source[order][is_first]

    def places(self, contents: np.ndarray) -> dict[int, list[tuple[Path, int]]]:
        """Content -> the (shard, row) of every sample that has it."""
        found: dict[int, list[tuple[Path, int]]] = {}
        for at in np.flatnonzero(occurs(self.content, np.sort(contents))).tolist():
            shard = int(np.searchsorted(self.first, at, side="right")) - 1
            found.setdefault(int(self.content[at]), []).append((self.shards[shard], at - int(self.first[shard])))
        return found


def quotas(available: np.ndarray, samples: int) -> np.ndarray:
    """How many of `samples` each source gives, int64 [sources]: its share by largest remainder, and at least one.

    Raises ValidationError for fewer samples than sources, and for as many as there are or more.
    """
    total, given = int(available.sum()), np.zeros(len(available), np.int64)
    if not np.count_nonzero(available) <= samples < total:
        raise ValidationError(
            f"--samples {samples}: expected at least one a source and fewer than there are: "
            f"{np.count_nonzero(available)} sources with {total} distinct samples"
        )
    is_open = available > 0
    while True:  # a source whose share is less than one sample gets one, and the others share the rest
        rest, weight = samples - int(given.sum()), int(available[is_open].sum())
        small = is_open & (rest * available < weight)
        if not small.any():
            break
        given[small] = 1
        is_open &= ~small
    whole, remainder = np.divmod(rest * available[is_open], weight)
    whole[np.argsort(-remainder, kind="stable")[: rest - int(whole.sum())]] += 1
    given[is_open] = whole
    return given


def draw(
    shards: list[Path],
    out: Path,
    *,
    samples: int,
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: Path | None = None,
) -> dict:
    """Draw the set into `out`, which appears complete or not at all, and return its record (`validation.json`).

    The same set that is there already is left as it is. Raises ValidationError if `out` holds anything else, or the
    request does not fit the shards; ValueError or OSError for shards that cannot be read.
    """
    stock = Stock.read(shards, tokenizer, cache_dir)
    content, source = stock.distinct()
    available = np.bincount(source, minlength=len(stock.source_names))
    given = quotas(available, samples)
    drawn_from = {"samples": len(stock.content), "distinct": len(content), "digest": contents_digest(content)}
    record = {"seed": seed, "samples": samples, "drawn_from": drawn_from}
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        return _as_before(out, record)
    candidates = []
    for number in range(len(given)):
        mine = content[source == number]
        candidates.append(mine[np.argsort(salted(mine, "validation", seed), kind="stable")])
    temporary = out.absolute().with_name(f".{out.absolute().name}.validation.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    try:
        with ShardWriter(temporary, tokenizer) as writer, tqdm(total=samples, unit="sample", desc="copy") as bar:
            copier = _Copier(stock, writer, lambda path: load_index(path, tokenizer, cache_dir))
            copier.expect([mine[:count] for mine, count in zip(candidates, given, strict=True)])
            copied = [copier.most(mine, int(count), bar) for mine, count in zip(candidates, given, strict=True)]
        record["digest"] = contents_digest(np.array([each for some in copied for each in some], np.uint64))
        record["by_source"] = {
            name: {"available": int(available[number]), "share": available[number] / len(content), "drawn": len(some)}
            for number, (name, some) in enumerate(zip(stock.source_names, copied, strict=True))
        }
        record["passed_over"] = copier.passed_over
        _require_written(temporary, record, tokenizer)
        write_json(temporary / RECORD, record)
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return record


def _as_before(out: Path, record: dict) -> dict:
    try:
        before = json.loads((out / RECORD).read_text())
    except (OSError, ValueError):
        before = {}
    if any(before.get(name) != value for name, value in record.items()):
        raise ValidationError(
            f"{out} holds something else than this set; a validation set stays as it was drawn: give another --out"
        )
    return before


def _require_written(folder: Path, record: dict, tokenizer: PreTrainedTokenizerBase) -> None:
    """The copies have the contents that were drawn: a fault here would let training see them."""
    written = np.concatenate([load_index(path, tokenizer).content for path in find_shards(folder)])
    if contents_digest(written) != record["digest"]:
        raise RuntimeError(f"the copies in {folder} are not what was drawn: {contents_digest(written)}, {record}")


class _Copier:
    """Copies samples, wherever they lie, into one writer."""

    def __init__(self, stock: Stock, writer: ShardWriter, open_index: Callable[[Path], ShardIndex]):
        self._stock, self._writer = stock, writer
        self._index = lru_cache(maxsize=8)(open_index)
        self._places: dict[int, list[tuple[Path, int]]] = {}
        self._keys: set[str] = set()
        self.passed_over: list[dict] = []
        """Samples that could not be read: shard, key, reason, detail."""

    def expect(self, contents: list[np.ndarray]) -> None:
        """Find out where these lie, in one go."""
        self._places |= self._stock.places(np.concatenate(contents))

    def most(self, contents: np.ndarray, count: int, bar: tqdm) -> list[int]:
        """Copy the first `count` that can be read, and return them."""
        copied: list[int] = []
        for content in contents.tolist():
            if len(copied) == count:
                break
            places = self._places.get(content) or self._stock.places(np.array([content], np.uint64))[content]
            # of several copies the first by key, so that the order of the shards does not matter
            key, path, row = min((str(self._index(path).keys[row]), path, row) for path, row in places)
            try:
                meta, jpegs = self._read(path, row)
                self._writer.write(meta | {"key": self._new_key(key, content)}, jpegs)
            except (SampleError, MediaError) as error:
                logger.warning("passed over %s, %s: %s", path, key, error)
                self.passed_over.append(
                    {"shard": str(path), "key": key, "reason": error.reason, "detail": error.detail}
                )
                continue
            copied.append(content)
            bar.update()
        return copied

    def _read(self, path: Path, row: int) -> tuple[dict, list[bytes]]:
        reader = ShardReader(path, self._index(path))
        try:
            meta, jpegs = reader.read(row)
        except OSError as error:
            raise SampleError("unreadable_shard", str(error)) from error
        finally:
            reader.close()
        if isinstance(jpegs, Clip):
            raise SampleError("whole_video", "a set holds frames: prepare the videos, or name tars of them as data.val")
        for jpeg in jpegs:
            jpeg_size(jpeg)
            jpeg_pixels(jpeg)
        return meta, jpegs

    def _new_key(self, key: str, content: int) -> str:
        """The key itself, unless it came before or is not what a shard of ours may hold."""
        new = re.sub(r"[^A-Za-z0-9_+=@-]", "_", key)
        if new != key or new in self._keys or len(new) > 80:
            new = f"{new[:63]}-{content:016x}"
        self._keys.add(new)
        return new


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.validation",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shards", nargs="+", required=True, help="folders, patterns or .tar files to draw from")
    parser.add_argument("--out", type=Path, required=True, metavar="SHARDS", help="folder to write")
    parser.add_argument("--samples", type=int, default=1000, help="size of the set (default 1000)")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws another set (default 0)")
    parser.add_argument("--tokenizer", default="tiny", help="the one that the shards were prepared with (default tiny)")
    parser.add_argument("--cache-dir", type=Path, help="folder for indexes of shards without one that fits")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0 done, 1 failed, 2 wrong usage."""
    asked = parse(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        tokenizer = load_tokenizer(asked.tokenizer)
        options = {name: getattr(asked, name) for name in ("samples", "seed", "cache_dir")}
        record = draw(find_shards(asked.shards), asked.out, tokenizer=tokenizer, **options)
    except (ValidationError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    drawn = sum(each["drawn"] for each in record["by_source"].values())
    print(f"{drawn} of {record['drawn_from']['distinct']} distinct samples in {asked.out}; leave them out of training")
    print("by content with data.val: this folder. By source:")
    for name, each in record["by_source"].items():
        print(f"  {each['drawn']:8d}  {name}  ({100 * each['share']:.2f} % of the shards' {each['available']})")
    if record["passed_over"]:
        print(f"passed over {len(record['passed_over'])} that cannot be read, see {asked.out / RECORD}")
    return 0 if drawn == asked.samples else 1


if __name__ == "__main__":
    sys.exit(main())
