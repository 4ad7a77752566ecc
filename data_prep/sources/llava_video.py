"""LLaVA-Video-178K: captions, open questions and multiple choice about videos.

`<subset>/*_processed.json`, a list of {id, conversations, data_source, video}; some rows have no id. Conversations are
of human and gpt, the human's texts with `<image>` where the video goes. Videos are `<subset>/<video>`: unpack the tar
files inside their own folders. Rows of `llava_hound` name folders of frames of another data set; they are refused.
"""

from __future__ import annotations

import os

from data_prep.sources.base import PublishedSource, Sample
from data_prep.sources.conversation import conversation, strip_placeholder
from data_prep.sources.files import Record
from fvlm.data.errors import SampleError

ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


class LlavaVideo(PublishedSource):
    """One row a conversation."""

    NAME = "llava_video"
    LICENCE = "Apache-2.0; for academic research and education, and OpenAI's usage policies apply"
    CITATION = "Zhang et al., Video Instruction Tuning With Synthetic Data, arXiv:2410.02713"
    HOMEPAGE = "https://huggingface.co/datasets/lmms-lab/LLaVA-Video-178K"
    FILES = ("*/*_processed.json", "*_processed.json")
    ID = "id"

    def sample(self, record: Record) -> Sample:
        video = self.text(record, "video")
        if not os.path.splitext(video)[1]:
            raise SampleError("frame_folder", f"video {video!r}: a folder of frames, expected a video file")
        chat = conversation(record.fields.get("conversations"), "from", "value", ROLES, strip_placeholder)
        tags = [tag for tag in (record.fields.get("data_source"),) if isinstance(tag, str) and tag]
        return Sample((self.path(self.subset(record), video),), chat | ({"tags": tags} if tags else {}))
