"""The Cauldron: fifty data sets of questions about pictures, one or several a row.

`<subset>/train-*.parquet`: images, a list of {bytes, path}, and texts, a list of {user, assistant, source}: exchanges
about the same pictures, which become the turns of one sample.
"""

from __future__ import annotations

from data_prep.sources.base import PublishedSource, Sample
from data_prep.sources.conversation import as_text, strip_placeholder
from data_prep.sources.files import Record
from fvlm.data.errors import SampleError


class Cauldron(PublishedSource):
    """One row a picture, or a group of them."""

    NAME = "cauldron"
    LICENCE = "prompts CC-BY-4.0; each subset under its own licence, see the homepage"
    CITATION = "Laurençon et al., What matters when building vision-language models?, arXiv:2405.02246"
    HOMEPAGE = "https://huggingface.co/datasets/HuggingFaceM4/the_cauldron"
    FILES = ("*/train-*.parquet", "*.parquet")
    COLUMNS = ("images", "texts")

    def sample(self, record: Record) -> Sample:
        media, texts = self.packed(record, "images"), record.fields.get("texts")
        if not isinstance(texts, list) or not texts or not all(isinstance(text, dict) for text in texts):
            raise SampleError("bad_turns", "texts: expected a list of {user, assistant, source}")
        turns = [
            {
                "user": strip_placeholder(as_text(text.get("user"), f"texts {number}, user")),
                "assistant": as_text(text.get("assistant"), f"texts {number}, assistant"),
            }
            for number, text in enumerate(texts)
        ]
        subset = self.subset(record) or texts[0].get("source")
        tags = {"tags": [subset]} if isinstance(subset, str) and subset else {}
        return Sample(media, (turns[0] if len(turns) == 1 else {"turns": turns}) | tags)
