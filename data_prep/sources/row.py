"""What every adapter gives: rows, with checked texts and keys that shards accept."""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass, field

from fvlm.data.errors import SampleError

_KEY_LENGTH = 80


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a data set, valid or refused, in its place."""

    key: str
    """Unique in the data set, of the characters a shard's key may have."""
    media: tuple[str, ...] = ()
    """Files to read, in order: paths, or references into parquet files (`data_prep.packed`)."""
    meta: dict = field(default_factory=dict)
    """Fields of the sample's metadata, without key and what the files tell."""
    refused: tuple[str, str] | None = None
    """(reason, detail) if the row cannot be used."""
    urls: tuple[str, ...] = ()
    """Where the files can be had, one for each of `media`; empty where the data set gives no addresses."""


def clean_key(given: str) -> str:
    """A key of the characters and length that shards accept; two names made alike by this stay two."""
    key = re.sub(r"[^A-Za-z0-9_+=@-]", "_", given)
    if key != given or len(key) > _KEY_LENGTH:
        key = f"{key[:71]}-{zlib.crc32(given.encode('utf-8', 'surrogatepass')):08x}"
    return key


def check_text(meta: dict) -> None:
    """Answers that are there and not blank, options that hold the answer; `chat.text_counts` checks the rest.

    Raises SampleError `missing_field`, `empty_text`, `wrong_type` or `bad_options`.
    """
    if "turns" in meta:
        answers = {"turns": " ".join(str(turn) for turn in meta["turns"])}
    elif "chosen" in meta or "rejected" in meta:
        answers = {name: meta.get(name) for name in ("chosen", "rejected")}
    else:
        answers = {"assistant": meta.get("assistant")}
    for name, answer in answers.items():
        if answer is None:
            raise SampleError("missing_field", f"{name}: a row needs assistant, or turns, or chosen and rejected")
        if not answer.strip():
            raise SampleError("empty_text", f"{name} is blank")
    if "options" in meta:
        options, answer = meta["options"], meta.get("answer")
        if not all(isinstance(option, str) for option in options):
            raise SampleError("wrong_type", "options: expected strings")
        if type(answer) is not int or not 0 <= answer < len(options) or meta.get("assistant") != options[answer]:
            raise SampleError("bad_options", f"answer {answer!r}: expected the position of `assistant` in `options`")
