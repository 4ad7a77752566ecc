"""ShareGPT4Video: videos with captions by GPT-4V.

`sharegpt4video_40k.jsonl`: video_id, video_path, zip_folder, captions, ... `captions` is a list of {idx, content}, one
for each pair of key frames, and the whole video's with idx "-1", which is the one used here. Videos are at `video_path`
in the media folder, where the zip files were unpacked. Known from programs that read it, not from its rows.
"""

from __future__ import annotations

from data_prep.sources.base import PublishedSource, Sample
from data_prep.sources.conversation import as_text
from data_prep.sources.files import Record
from fvlm.data.errors import SampleError


class ShareGPT4Video(PublishedSource):
    """One row a video."""

    NAME = "sharegpt4video"
    LICENCE = "CC-BY-NC-4.0"
    CITATION = (
        "Chen et al., ShareGPT4Video: Improving Video Understanding and Generation with Better Captions, "
        "arXiv:2406.04325"
    )
    HOMEPAGE = "https://huggingface.co/datasets/ShareGPT4Video/ShareGPT4Video"
    FILES = ("sharegpt4video_40k.jsonl",)
    ID = "video_id"

    def sample(self, record: Record) -> Sample:
        captions = record.fields.get("captions")
        if not isinstance(captions, list) or not all(isinstance(caption, dict) for caption in captions):
            raise SampleError("wrong_type", "captions: expected a list of {idx, content}")
        whole = [caption for caption in captions if str(caption.get("idx")) == "-1"]
        if len(whole) != 1:
            raise SampleError("missing_field", f"captions: {len(whole)} with idx -1, the whole video's; expected one")
        media = self.path(self.text(record, "video_path"))
        return Sample((media,), {"assistant": as_text(whole[0].get("content"), "captions, content")})
