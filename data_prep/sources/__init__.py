"""One adapter a data set: where its rows are, how they map to a sample, its licence. See `folder` for the interface."""

from __future__ import annotations

from data_prep.sources.folder import FolderSource, Row

SOURCES = {"folder": FolderSource}

__all__ = ["SOURCES", "FolderSource", "Row"]
