"""WebVid: stock clips with their titles, by address.

CSV files with two column orders: videoid, name, page_idx, page_dir, duration, contentUrl (`results_2M_train.csv`), and
videoid, contentUrl, duration, page_dir, name (the partitions of WebVid-10M). `duration` is ISO-like (PT00H00M17S) and
not needed: the file tells. Clips are `<page_dir>/<videoid>.mp4` in the folder of the media, as the data set's own
script puts them.
"""

from __future__ import annotations

from data_prep.sources.base import PublishedSource, Sample
from data_prep.sources.conversation import as_text
from data_prep.sources.files import Record


class WebVid(PublishedSource):
    """One row a clip."""

    NAME = "webvid"
    LICENCE = "addresses and captions: non-commercial research, 12 months at a time (TERMS.md); the videos are others'"
    CITATION = "Bain et al., Frozen in Time: A Joint Video and Image Encoder for End-to-End Retrieval, arXiv:2104.00650"
    HOMEPAGE = "https://github.com/m-bain/webvid"
    FILES = ("results_*_train.csv", "data/train/partitions/*.csv", "*.csv")
    ID = "videoid"

    def sample(self, record: Record) -> Sample:
        video = self.text(record, "videoid")
        page = record.fields.get("page_dir") or ""  # some rows have none
        media = self.path(page, f"{video}.mp4" if video else "")
        url = record.fields.get("contentUrl")
        return Sample((media,), {"assistant": self.text(record, "name")}, (as_text(url, "contentUrl"),) if url else ())
