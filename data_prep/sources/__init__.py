"""One adapter a data set: where its rows are, how they map to a sample, its licence and citation."""

from __future__ import annotations

from pathlib import Path

from data_prep.sources.base import PublishedSource
from data_prep.sources.cauldron import Cauldron
from data_prep.sources.folder import FolderSource
from data_prep.sources.llava_video import LlavaVideo
from data_prep.sources.openvid import OpenVid
from data_prep.sources.rlaif_v import RlaifV
from data_prep.sources.row import Row
from data_prep.sources.sharegpt4video import ShareGPT4Video
from data_prep.sources.smoltalk import SmolTalk
from data_prep.sources.vista import Vista
from data_prep.sources.vript import Vript
from data_prep.sources.webvid import WebVid

_PUBLISHED = (OpenVid, WebVid, Vript, ShareGPT4Video, LlavaVideo, Vista, Cauldron, SmolTalk, RlaifV)
SOURCES = {source.NAME: source for source in (FolderSource, *_PUBLISHED)}

__all__ = ["SOURCES", "FolderSource", "PublishedSource", "Row", "licences", "open_source"]


def open_source(
    name: str, folder: Path | None, manifest: Path | None = None, media: Path | None = None
) -> FolderSource | PublishedSource:
    """The source `name`, with its annotation files in `folder` (or only `manifest`) and its media in `media`.

    Raises FileNotFoundError if the files are not there.
    """
    return SOURCES[name](folder, manifest, media)


def licences(names: list[str]) -> dict[str, dict[str, str]]:
    """Licence, citation and homepage by source name; a name that only a manifest uses has its folder's."""
    known = {name: SOURCES.get(name, FolderSource) for name in names}
    return {
        name: {"licence": source.LICENCE, "citation": source.CITATION, "homepage": source.HOMEPAGE}
        for name, source in known.items()
    }
