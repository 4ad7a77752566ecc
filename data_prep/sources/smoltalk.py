"""SmolTalk: chats without pictures.

`data/all/train-*.parquet`: messages, a list of {role, content}, and source, the subset's name. The folders beside `all`
hold the same rows by subset (without `source`; other columns differ), and are read only where `all` is not there.
Subsets such as systemchats and smol-summarize give each chat a system message, which moves into the first user text.
"""

from __future__ import annotations

from data_prep.sources.base import PublishedSource, Sample
from data_prep.sources.conversation import conversation
from data_prep.sources.files import Record


class SmolTalk(PublishedSource):
    """One row a chat."""

    NAME = "smoltalk"
    LICENCE = "Apache-2.0 for the new subsets; the public ones keep their own, see the homepage"
    CITATION = "Allal et al., SmolLM2: When Smol Goes Big, arXiv:2502.02737"
    HOMEPAGE = "https://huggingface.co/datasets/HuggingFaceTB/smoltalk"
    FILES = ("data/all/train-*.parquet", "data/*/train-*.parquet", "train-*.parquet")
    COLUMNS = ("messages", "source")

    def sample(self, record: Record) -> Sample:
        roles = {"user": "user", "assistant": "assistant", "system": "system"}
        chat = conversation(record.fields.get("messages"), "role", "content", roles)
        subset = record.fields.get("source") or self.subset(record)
        return Sample((), chat | ({"tags": [subset]} if isinstance(subset, str) and subset else {}))
