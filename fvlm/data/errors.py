"""Errors about one sample or one medium: counted by reason, reported with key and file, and survived."""

from __future__ import annotations


class _Reasoned(ValueError):
    """`reason` is a short snake_case word that summaries count; `detail` says what was found and what was expected."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)  # both in args, so that it travels between processes
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


class SampleError(_Reasoned):
    """A sample that cannot be used: a damaged shard member, a wrong field, an empty text."""


class MediaError(_Reasoned):
    """A media file that cannot be read."""


class ShardError(_Reasoned):
    """A shard that cannot be read, or not to its end."""
