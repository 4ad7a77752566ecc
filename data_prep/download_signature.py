"""Whether bytes begin as a picture or a video does: what a server calls them may be wrong."""

from __future__ import annotations

HEAD = 512
"""Bytes to look at."""
_MAGIC = (  # offset, bytes
    (0, b"\xff\xd8\xff"),  # JPEG
    (0, b"\x89PNG\r\n\x1a\n"),
    (0, b"GIF8"),
    (0, b"BM"),
    (0, b"II*\0"),  # TIFF
    (0, b"MM\0*"),
    (8, b"WEBP"),
    (8, b"AVI "),
    (0, b"\0\0\0\x0cjP  "),  # JPEG 2000
    (0, b"\x1aE\xdf\xa3"),  # Matroska, WebM
    (0, b"FLV\x01"),
    (0, b"OggS"),
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11"),  # ASF, WMV
    (0, b"\0\0\x01\xba"),  # MPEG program stream
    (0, b"\0\0\x01\xb3"),  # MPEG video
    *((4, box) for box in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")),  # MP4, MOV, AVIF, HEIC
)
_TRANSPORT_PACKET = 188  # bytes of an MPEG transport stream, each beginning with "G"


def is_media(head: bytes) -> bool:
    """True if the first bytes of a file are those of a picture or video container."""
    if any(head[offset:].startswith(magic) for offset, magic in _MAGIC):
        return True
    syncs = head[::_TRANSPORT_PACKET]
    return len(syncs) >= 3 and set(syncs) == {ord("G")}


def describe(head: bytes) -> str:
    """What the bytes are instead, for a message."""
    start = head.lstrip()[:64]
    if start[:1] == b"<":
        return f"a page of HTML or XML: {start.decode('ascii', 'replace')!r}"
    return f"it begins with {start!r}"
