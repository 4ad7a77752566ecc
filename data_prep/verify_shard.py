"""One shard checked: its tar, its members, its samples, and its index against them."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from data_prep.unit import RECORDS
from data_prep.verify_findings import Findings, describe
from fvlm.data.chat import TextCounts, load_tokenizer, tokenizer_hash
from fvlm.data.errors import MediaError, ShardError
from fvlm.data.scan import TarScan, scan_tar
from fvlm.data.shard import ShardIndex
from fvlm.data.shard_index import fingerprint
from fvlm.data.shard_rows import index_rows
from fvlm.data.video import jpeg_pixels, jpeg_size

_TOKENS = tuple(each.name for each in fields(TextCounts))
_SHOWN = 120  # characters of a value in a message


@dataclass(frozen=True, kw_only=True, slots=True)
class Checks:
    """What is asked of every shard."""

    tokenizer: str | None = None
    """None: token counts are checked if the built-in one made them."""
    decode: float = 1.0
    """Share of the frames that are decoded, by content; the headers of all are read."""
    size: int | None = None
    """Side of a frame in pixels; None: as the shard's folder was prepared, if that is on record there."""
    seed: int = 0
    """Of the sheets' samples."""


def verify_shard(path: Path, checks: Checks) -> Findings:
    """Read a shard through. Whatever its bytes are, they lead to problems and not to an exception."""
    found = Findings(shard=str(path))
    look = _FrameCheck(found, checks, checks.size or _prepared_size(path.parent))
    try:
        scan = scan_tar(path, found.report, look)
        found.size, tar_fingerprint = path.stat().st_size, fingerprint(path)
    except (ShardError, OSError) as error:
        found.report("", getattr(error, "reason", "unreadable_tar"), getattr(error, "detail", str(error)))
        return found
    for name in scan.orphans:
        found.report(name, "unclaimed_member", "it belongs to no sample: no metadata of that key")
    tokenizer = _tokenizer(checks.tokenizer or "tiny")
    rows = index_rows(scan, tokenizer, found.report)
    truth = ShardIndex.from_rows(rows, tokenizer_hash(tokenizer), tar_fingerprint)
    index = _stored_index(path, found)
    tokens, counted_by = truth.tokens, truth.tokenizer_hash
    if index is not None:
        with_tokens = _counted_alike(index, truth, checks, found)
        _compare(path, index, truth, _differences(index, truth, scan, with_tokens), found)
        if not with_tokens:
            stored = dict(zip(index.keys.tolist(), index.tokens.tolist(), strict=True))
            tokens = np.array([stored.get(key, 0) for key in truth.keys.tolist()], np.int32)
            counted_by = index.tokenizer_hash
    found.tokenizers.add(counted_by)
    describe(found, truth, rows, tokens, checks.seed)
    return found


class _FrameCheck:
    """Looks at each frame as it is read."""

    def __init__(self, found: Findings, checks: Checks, size: int | None):
        self._found, self._decode, self._size = found, checks.decode, size

    def __call__(self, name: str, jpeg: bytes) -> None:
        try:
            width, height = jpeg_size(jpeg)
            self._found.frame_sizes[width, height] += 1
            if self._size is not None and (width, height) != (self._size, self._size):
                self._found.report(name, "wrong_size", f"{width} x {height} pixels, expected {self._size}")
            if self._decode == 1 or zlib.crc32(jpeg) < self._decode * 2**32:
                jpeg_pixels(jpeg)
        except MediaError as error:
            self._found.report(name, error.reason, error.detail)


@lru_cache(maxsize=4)
def _prepared_size(folder: Path) -> int | None:
    """Side of the frames in pixels, where preparation noted it."""
    try:
        size = json.loads((folder / RECORDS / "request.json").read_text())["size"]
    except (OSError, ValueError, LookupError, TypeError):
        return None  # not prepared here
    return size if isinstance(size, int) else None


@lru_cache(maxsize=2)
def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    return load_tokenizer(name)


def _stored_index(path: Path, found: Findings) -> ShardIndex | None:
    """The index beside the tar."""
    place = path.with_suffix(".idx")
    if not place.is_file():
        found.notes["shards without an index beside them: training builds one in data.cache_dir"] += 1
        return None
    try:
        return ShardIndex.load(place)
    except ValueError as error:
        found.report("", "unreadable_index", str(error))
        return None


def _counted_alike(index: ShardIndex, truth: ShardIndex, checks: Checks, found: Findings) -> bool:
    """Whether the token counts can be compared."""
    if index.tokenizer_hash == truth.tokenizer_hash:
        return True
    if checks.tokenizer:
        found.report(
            "", "other_tokenizer", f"counted with {index.tokenizer_hash}; {checks.tokenizer} is {truth.tokenizer_hash}"
        )
    else:
        found.notes[
            f"shards whose token counts were not checked: counted with tokenizer {index.tokenizer_hash}, "
            f"name it with --tokenizer"
        ] += 1
    return False


def _compare(
    path: Path, index: ShardIndex, truth: ShardIndex, differences: list[tuple[str, str, str]], found: Findings
) -> None:
    """Report where index and tar differ; of an index that is plainly of another tar, that alone."""
    if index.tar_fingerprint != truth.tar_fingerprint:
        such_as = f", such as {', '.join(key for key, *_ in differences[:3])}" if differences else ""
        found.report(
            "",
            "stale_index",
            f"{path.with_suffix('.idx')} was made for another version of the tar: of its {len(index)} samples and the "
            f"tar's {len(truth)}, {len(differences)} differ{such_as}",
        )
        if 2 * len(differences) > len(index):
            return
    for difference in differences:
        found.report(*difference)


def _differences(index: ShardIndex, truth: ShardIndex, scan: TarScan, with_tokens: bool) -> list[tuple[str, str, str]]:
    """(key, reason, detail) of every sample of which index and tar say different things."""
    stored, real = _facts(index, with_tokens), _facts(truth, with_tokens)
    differences = []
    for key, facts in real.items():
        if key not in stored:
            differences.append((key, "not_in_index", "the tar has it, the index does not: training never sees it"))
            continue
        wrong = {name: value for name, value in facts.items() if stored[key][name] != value}
        if wrong:
            differences.append((key, _reason(wrong), _detail(wrong, stored[key])))
    lost = [key for key in stored if key not in scan.metas]  # another that is lacking has its own problem already
    return differences + [(key, "missing_member", f"the index lists it, the tar has no {key}.json") for key in lost]


def _facts(index: ShardIndex, with_tokens: bool) -> dict[str, dict[str, object]]:
    """Key -> what the index says of it."""
    columns = {
        "checksum": index.checksum.tolist(),
        "frame_count": index.num_frames.tolist(),
        "metadata_place": list(zip(index.json_offset.tolist(), index.json_size.tolist(), strict=True)),
        "source": [index.source_names[source] for source in index.source.tolist()],
        "tags": [index.tag_sets[number] for number in index.tag_set.tolist()],
        "kind": index.kind.tolist(),
        "duration": index.duration.tolist(),
        "content": index.content.tolist(),
    }
    places = list(zip(index.frame_offset.tolist(), index.frame_size.tolist(), strict=True))
    bounds = index.first_frame.tolist()
    columns["frame_places"] = [places[low:high] for low, high in pairwise(bounds)]
    columns |= {name: getattr(index, name).tolist() for name in _TOKENS} if with_tokens else {}
    samples = zip(*columns.values(), strict=True)
    return {
        key: dict(zip(columns, values, strict=True)) for key, values in zip(index.keys.tolist(), samples, strict=True)
    }


def _reason(wrong: Mapping) -> str:
    if "checksum" in wrong:
        return "changed_bytes"
    if "frame_count" in wrong:
        return "wrong_frame_count"
    if "metadata_place" in wrong or "frame_places" in wrong:
        return "wrong_place"
    return "wrong_token_count" if any(name in wrong for name in _TOKENS) else "wrong_field"


def _detail(wrong: Mapping, stored: Mapping) -> str:
    if "checksum" in wrong:
        return "its bytes are not those that were indexed"
    return "; ".join(
        f"{name} {value!s:.{_SHOWN}}, the index says {stored[name]!s:.{_SHOWN}}" for name, value in wrong.items()
    )
