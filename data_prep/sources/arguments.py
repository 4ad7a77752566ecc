"""Command-line arguments that name a source, shared by preparation and download."""

from __future__ import annotations

import argparse
from pathlib import Path

from data_prep.sources import SOURCES


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--source", choices=SOURCES, default="folder", help="the data set (default folder)")
    parser.add_argument("--input", type=Path, metavar="DIR", help="folder of the data set's files")
    parser.add_argument(
        "--manifest",
        type=Path,
        metavar="FILE",
        help="for folder: the JSONL file, inside --input or by its own path; "
        "else one annotation file to read instead of all that are published",
    )


def check_source_arguments(parser: argparse.ArgumentParser, asked: argparse.Namespace) -> None:
    """Leave with a usage error if the source is not told where its files are."""
    if asked.source == "folder" and asked.manifest is None:
        parser.error("--source folder: expected --manifest FILE, a JSONL file of rows")
    if asked.input is None and asked.manifest is None:
        homepage = SOURCES[asked.source].HOMEPAGE
        parser.error(f"--source {asked.source}: expected --input DIR, the folder of what {homepage} publishes")
