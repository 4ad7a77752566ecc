"""SmolTalk: chats without pictures.

`data/all/train-*.parquet`: messages, a list of {role, content}, and source, the subset's name. The folders beside `all`
hold the same rows by subset (without `source`; other columns differ), and are read only where `all` is not there.
Rows of the subset whose name says that it holds chains of thought (numina-cot-100k) are tagged `chain_of_thought` too,
beside the subset's name; the files mark no others. Subsets such as systemchats and smol-summarize give each chat a
system message, which moves into the first user text.
"""

from __future__ import annotations

from data_prep.sources.base import PublishedSource, Sample
from data_prep.sources.conversation import conversation
from data_prep.sources.files import Record

CHAINS_OF_THOUGHT = ("numina-cot-100k",)


class SmolTalk(PublishedSource):
    """One row a chat."""

    NAME = "smoltalk"
    LICENCE = "Apache-2.0 for the new subsets; the public ones keep their own, see the homepage"
    CITATION = "Allal et al., SmolLM2: When Smol Goes Big, arXiv:2502.02737"
    HOMEPAGE = "https://huggingface.co/datasets/HuggingFaceTB/smoltalk"
    FILES = ("data/all/train-*.parquet", "data/*/train-*.parquet", "train-*.parquet")
    COLUMNS = ("messages", "source")
    VERSION = 2

    def sample(self, record: Record) -> Sample:
        roles = {"user": "user", "assistant": "assistant", "system": "system"}
        chat = conversation(record.fields.get("messages"), "role", "content", roles)
        subset = record.fields.get("source") or self.subset(record)
        tags = [subset] if isinstance(subset, str) and subset else []
        tags += ["chain_of_thought"] if subset in CHAINS_OF_THOUGHT else []
        return Sample((), chat | ({"tags": tags} if tags else {}))
