"""Indexes of shards that lie here or elsewhere; of a remote shard the index comes alone, the tar when it is read."""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from fvlm.data.chat import tokenizer_hash
from fvlm.data.errors import ShardError
from fvlm.data.remote import RemoteShard, describe, download
from fvlm.data.shard_cache import ShardCache
from fvlm.data.shard_index import ShardIndex, build_index

logger = logging.getLogger(__name__)

_AT_ONCE = 16


def find_remote_indexes(
    shards: Sequence[RemoteShard],
    tokenizer: PreTrainedTokenizerBase,
    cache: ShardCache | None,
    after_each: Callable[[], None] = lambda: None,
) -> dict[RemoteShard, Path]:
    """Local files with the indexes of remote shards, which need a `cache`; `after_each` is called in several threads.

    Raises ShardError for an index that cannot be had, ValueError without a cache.
    """
    if not shards:
        return {}
    if cache is None:
        raise ValueError(f"{shards[0]}: remote shards need a folder for their copies; name one (data.cache_dir)")
    wanted = tokenizer_hash(tokenizer)

    def find(shard: RemoteShard) -> Path:
        path = _remote_index(shard, tokenizer, wanted, cache)
        after_each()
        return path

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        paths = pool.map(find, shards)
        bar = tqdm(paths, "remote indexes", len(shards), unit="shard", disable=None, leave=False)
        return dict(zip(shards, bar, strict=True))


def _remote_index(shard: RemoteShard, tokenizer: PreTrainedTokenizerBase, wanted: str, cache: ShardCache) -> Path:
    """The index beside the shard if it was counted with this tokenizer, else one that is made of the tar, and kept."""
    folder = cache.folder / "indexes"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        path = _published_index(shard, folder, cache)
        found = ShardIndex.load(path).tokenizer_hash
        if found == wanted:
            return path
        reason = f"its index was counted with tokenizer {found}, not {wanted}"
    except ShardError as error:
        if error.reason not in ("missing_shard", "forbidden_shard"):
            raise
        reason = f"it has no index beside it: {error}"
    _, version = describe(shard.url, cache.patience)
    built = folder / f"{shard.stem}-{version or 'unversioned'}-{wanted}.idx"
    if built.is_file():
        return built
    logger.warning("downloading %s to index it: %s", shard, reason)
    with cache.held(shard) as path:
        index = build_index(path, tokenizer, shard.folder)
    index.save(built)
    return built


def _published_index(shard: RemoteShard, folder: Path, cache: ShardCache) -> Path:
    """The index beside the shard; a copy of it serves as long as the server says that nothing has changed."""
    url = shard.beside(".tar", ".idx")
    _, version = describe(url, cache.patience)
    path = folder / f"{shard.stem}-{version or 'unversioned'}.idx"
    if version and path.is_file():
        return path
    part = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")

    def check(part: Path) -> None:
        try:
            found = ShardIndex.load(part).tar_fingerprint
        except ValueError as error:
            raise ShardError("damaged_download", f"{url}: {error}") from error
        if not re.fullmatch(r"[0-9]{1,15}-[0-9a-f]{8}", found):  # it becomes part of a file's name
            raise ShardError("damaged_download", f"{url}: fingerprint {found[:80]!r} of its tar")

    try:
        download(url, part, cache.patience, check)
        part.rename(path)
    finally:
        part.unlink(missing_ok=True)
    return path
