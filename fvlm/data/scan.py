"""Reading a tar through: its members in order, and the samples they make up, before anybody judges those."""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from fvlm.data.clip import plan_frames
from fvlm.data.content import Piece
from fvlm.data.errors import MediaError, ShardError

MAX_MEMBER = 1 << 26
"""Bytes; a member beyond is left out, because members are read whole."""
Report = Callable[[str, str, str], None]
"""Takes (key or member name, reason, detail) of something that is left out."""

_META, _TEXT, _PICTURES = ".json", ".txt", (".jpg", ".jpeg")
_FRAME = re.compile(r"(.+)[._](\d{3,6})")
_MEDIA = (".mp4", ".webm", ".mkv", ".mov", ".avi")
_SIDECARS = (".tokens.npy", _TEXT)  # of a sample, and not needed
_MALFORMED = (tarfile.TarError, ValueError, ArithmeticError, LookupError, RecursionError)  # what tarfile lets through


class Video(NamedTuple):
    """A whole video."""

    piece: Piece
    seconds: float
    num_frames: int
    """That it gives (`fvlm.data.clip`)."""


@dataclass(slots=True)
class TarScan:
    """The members of a tar by sample."""

    metas: dict[str, tuple[Piece, bytes]] = field(default_factory=dict)
    """Key -> its metadata."""
    frames: dict[str, dict[int, Piece]] = field(default_factory=dict)
    """Key -> number -> frame."""
    videos: dict[str, Video | None] = field(default_factory=dict)
    """Key -> whole video; None: one that cannot be read, which was reported."""
    texts: dict[str, tuple[Piece, bytes]] = field(default_factory=dict)
    """Key -> its text file, where whole videos are read."""
    orphans: list[str] = field(default_factory=list)
    """Names of members that belong to no sample."""


def scan_tar(
    path: Path, report: Report, look: Callable[[str, bytes], None] | None = None, *, videos: bool = False
) -> TarScan:
    """Every frame and every metadata member of a tar, each read once; `look` is called with a frame's name and bytes.

    Frames are `{key}.000.jpg`, `{key}_000.jpg` or one `{key}.jpg`; metadata is `{key}.json`. With `videos` also whole
    ones (`{key}.mp4`, ...) and `{key}.txt`. Damage on the way is reported. Raises ShardError `unreadable_tar` if there
    is not one member to read, and `holds_videos` for one that is not asked for.
    """
    scan, pictures, others = TarScan(), [], []
    wanted = (_META, *_PICTURES, *((_TEXT, *_MEDIA) if videos else ()))
    try:
        with open(path, "rb") as file:
            for member in walk_tar(path):
                stem, extension = os.path.splitext(member.name)
                extension = extension.lower()
                if extension in _MEDIA and not videos:
                    raise ShardError("holds_videos", f"{path} holds videos ({member.name}) instead of frames")
                if not member.isreg() or extension not in wanted:
                    others.append(member.name)
                    continue
                if member.size > MAX_MEMBER:
                    report(member.name, "too_large", f"{member.size} bytes, expected at most {MAX_MEMBER}")
                    if extension in _MEDIA:
                        scan.videos[stem] = None
                    continue
                content = os.pread(file.fileno(), member.size, member.offset_data)
                piece = Piece.of(content, member.offset_data)
                if extension in _PICTURES:
                    pictures.append((member.name, piece))
                    if look is not None:
                        look(member.name, content)
                    continue
                kept = {_META: scan.metas, _TEXT: scan.texts}.get(extension, scan.videos)
                if stem in kept:
                    report(stem, "duplicate_member", f"{member.name} comes again at byte {piece.offset}")
                kept[stem] = _video(member.name, piece, content, report) if kept is scan.videos else (piece, content)
    except OSError as error:
        raise ShardError("unreadable_tar", str(error)) from error
    except ShardError as error:
        if error.reason == "holds_videos" or not (pictures or scan.metas or scan.videos or others):
            raise
        report("", error.reason, error.detail)
    _group(scan, pictures, report)
    scan.orphans += [name for name in others if _owner(name) not in scan.metas]
    scan.orphans += [f"{key}{_TEXT}" for key in scan.texts if key not in scan.metas and key not in scan.videos]
    return scan


def _video(name: str, piece: Piece, content: bytes, report: Report) -> Video | None:
    try:
        return Video(piece, *plan_frames(content, name))
    except MediaError as error:
        report(name, error.reason, error.detail)
        return None


def _group(scan: TarScan, pictures: list[tuple[str, Piece]], report: Report) -> None:
    """Give each frame to its sample; only now is it known whether `a_001.jpg` is of `a` or the frame of `a_001`."""
    for name, piece in pictures:
        stem = os.path.splitext(name)[0]
        numbered = _FRAME.fullmatch(stem)
        key, number = (stem, 0) if stem in scan.metas or not numbered else (numbered[1], int(numbered[2]))
        if key not in scan.metas:
            scan.orphans.append(name)
            continue
        mine = scan.frames.setdefault(key, {})
        if number in mine:
            report(key, "duplicate_member", f"frame {number} comes again at byte {piece.offset}")
        mine[number] = piece


def _owner(name: str) -> str | None:
    return next((name.removesuffix(suffix) for suffix in _SIDECARS if name.endswith(suffix)), None)


def walk_tar(path: Path) -> Iterator[tarfile.TarInfo]:
    """The members of a tar in order, those that are there completely.

    Raises ShardError: `unreadable_tar` (not a tar), `truncated_tar` (the file ends too early), `damaged_tar` (something
    else than a member or the end where a member has to begin). tarfile alone takes the last two for the end.
    """
    size, end = path.stat().st_size, 0
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # it would remember them all
                if member.offset_data < end or member.size < 0:
                    raise ShardError("damaged_tar", f"{path}: a member of {member.size} bytes after byte {end}")
                end = member.offset_data + (member.size if member.isreg() else 0)
                if end > size:
                    raise ShardError("truncated_tar", f"{path} ends at byte {size}, its {member.name} at byte {end}")
                yield member
            stopped = tar.offset
    except ShardError:
        raise
    except tarfile.ReadError as error:
        reason = "unreadable_tar" if not end else "truncated_tar" if "unexpected end" in str(error) else "damaged_tar"
        raise ShardError(reason, f"{path}, after byte {end} of {size}: {error}") from error
    except _MALFORMED as error:
        reason = "damaged_tar" if end else "unreadable_tar"
        raise ShardError(reason, f"{path}, after byte {end}: {type(error).__name__}: {error}") from error
    _check_end(path, stopped, size)


def _check_end(path: Path, stopped: int, size: int) -> None:
    """A tar ends with a block of zeros and whatever zeros follow."""
    with open(path, "rb") as file:
        file.seek(stopped)
        if size - stopped < tarfile.BLOCKSIZE:
            raise ShardError("truncated_tar", f"{path} ends at byte {size} without an end-of-archive mark")
        while chunk := file.read(1 << 20):
            if chunk.count(0) != len(chunk):
                raise ShardError("damaged_tar", f"{path}: neither a member nor the archive's end at byte {stopped}")
