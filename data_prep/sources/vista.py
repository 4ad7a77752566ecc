"""VISTA-400K: questions about videos that were put together from others, in time and in space.

`<subset>.json`, a list of {image, conversations} of human and gpt; `image` names the video, in a folder of the
subset's name. Known from the loader in the data set's repository, not from its rows: a row with `video` instead is
taken as well, and anything else is refused.
"""

from __future__ import annotations

from data_prep.sources.base import PublishedSource, Sample
from data_prep.sources.conversation import conversation, strip_placeholder
from data_prep.sources.files import Record
from data_prep.sources.llava_video import ROLES


class Vista(PublishedSource):
    """One row a conversation."""

    NAME = "vista"
    LICENCE = "MIT; the videos are of other data sets, see the homepage"
    CITATION = (
        "Ren et al., VISTA: Enhancing Long-Duration and High-Resolution Video Understanding by Video Spatiotemporal "
        "Augmentation, arXiv:2412.00927"
    )
    HOMEPAGE = "https://huggingface.co/datasets/TIGER-Lab/VISTA-400K"
    FILES = ("*.json",)
    ID = "id"

    def sample(self, record: Record) -> Sample:
        video = self.text(record, "video" if "video" in record.fields else "image")
        chat = conversation(record.fields.get("conversations"), "from", "value", ROLES, strip_placeholder)
        subset = record.file.stem
        return Sample((self.path(subset, video),), chat | {"tags": [subset]})
