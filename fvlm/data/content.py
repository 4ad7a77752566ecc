"""What a sample is, apart from where it lies: a hash of what it shows and says, a checksum of its bytes."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from fvlm.data.chat import has_narration


class Piece(NamedTuple):
    """One member of a tar: where its bytes begin, how many they are, and two digests of them."""

    offset: int
    size: int
    crc: int
    """CRC-32."""
    digest: bytes
    """SHA-256."""

    @classmethod
    def of(cls, content: bytes, offset: int) -> Piece:
        """The piece of a tar that holds `content` from byte `offset` on."""
        return cls(offset, len(content), zlib.crc32(content), hashlib.sha256(content).digest())


def content_hash(meta: Mapping, frames: Iterable[Piece]) -> int:
    """64 bits of a SHA-256 over the sample's texts and its frames' bytes in order; key and source do not matter.

    One exchange is the same as `turns` with one entry, and an empty text the same as none. Two of n different samples
    share a value by chance with probability n^2 / 2^65: 5e-7 for 4.3 million.
    """
    turns = meta.get("turns") or [meta]
    said = [
        [[turn.get("user") or None, turn.get("assistant") or None] for turn in turns],
        [meta.get("chosen") or None, meta.get("rejected") or None],
        meta["narration"] if has_narration(meta) else None,
    ]
    digest = hashlib.sha256(hashlib.sha256(json.dumps(said).encode()).digest())
    for frame in frames:
        digest.update(frame.digest)
    return int.from_bytes(digest.digest()[:8], "little")


def checksum(crcs: Iterable[int]) -> int:
    """32 bits that change with any byte of a sample; `crcs` are CRC-32 of its metadata, then of each frame."""
    return zlib.crc32(np.fromiter(crcs, "<u4").tobytes())


def salted(contents: np.ndarray, *salt: int | str) -> np.ndarray:
    """uint64 [n]: each content mixed with the salt, so that sorting by it draws at random (SplitMix64's finish)."""
    word = int.from_bytes(hashlib.sha256(repr(salt).encode()).digest()[:8], "little")
    mixed = contents ^ np.uint64(word)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))


def contents_digest(contents: np.ndarray) -> str:
    """16 hex digits of a set of contents, in whatever order."""
    return hashlib.sha256(np.sort(contents).astype("<u8").tobytes()).hexdigest()[:16]


def occurs(contents: np.ndarray, among: np.ndarray) -> np.ndarray:
    """bool [n]: which of `contents` (uint64 [n]) are in `among` (uint64, ascending)."""
    if not len(among):
        return np.zeros(len(contents), np.bool_)
    at = np.searchsorted(among, contents)
    return among[np.minimum(at, len(among) - 1)] == contents
