"""RLAIF-V: a question about a picture, a better answer and a worse one.

Parquet files of ds_name, image ({bytes, path}), question, chosen, rejected, origin_dataset, origin_split (a JSON
string, not needed here), idx, image_path.
"""

from __future__ import annotations

from data_prep.sources.base import PublishedSource, Sample
from data_prep.sources.files import Record
from fvlm.data.errors import SampleError


class RlaifV(PublishedSource):
    """One row a preference pair."""

    NAME = "rlaif_v"
    LICENCE = "CC-BY-NC-4.0"
    CITATION = "Yu et al., RLAIF-V: Open-Source AI Feedback Leads to Super GPT-4V Trustworthiness, arXiv:2405.17220"
    HOMEPAGE = "https://huggingface.co/datasets/openbmb/RLAIF-V-Dataset"
    FILES = ("*.parquet", "data/*.parquet")
    COLUMNS = ("image", "question", "chosen", "rejected", "origin_dataset", "idx")
    ID = "idx"

    def sample(self, record: Record) -> Sample:
        texts = {name: self.text(record, name) for name in ("question", "chosen", "rejected")}
        if texts["chosen"].strip() == texts["rejected"].strip():
            raise SampleError("same_answers", "chosen and rejected say the same")
        origin = record.fields.get("origin_dataset")
        tags = {"tags": [origin]} if isinstance(origin, str) and origin else {}
        return Sample(self.packed(record, "image"), {"user": texts.pop("question")} | texts | tags)
