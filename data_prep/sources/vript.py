"""Vript: videos cut into scenes, each with a long caption written like a script.

Two publications of the same captions: `vript_captions/vript_long_videos_captions.jsonl` (and short), a line a scene
(meta.video_id, clip_id, caption), and one `<video>_caption.json` a video, `{"meta": ..., "data": {scene: {...}}}`. The
caption is an object; its `content` is the text (shot_type, camera_movement and scene_title are not used). Scenes are
`<video_id>/<clip_id>.mp4`: unpack the zip files of clips, and put the videos' folders side by side in the media folder.
Known from the data set's documents and from two readers of it, not from its rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from data_prep.sources.base import PublishedSource, Sample
from data_prep.sources.conversation import as_text
from data_prep.sources.files import Record
from fvlm.data.errors import SampleError


class Vript(PublishedSource):
    """One row a scene."""

    NAME = "vript"
    LICENCE = "academic research only, no redistribution; see the homepage's licence"
    CITATION = "Yang et al., Vript: A Video Is Worth Thousands of Words, arXiv:2406.06040"
    HOMEPAGE = "https://github.com/mutonix/Vript"
    FILES = ("vript_captions/*_captions.jsonl", "*_captions.jsonl", "**/*_caption.json")
    ID = "clip_id"

    def count(self) -> int:
        return sum(1 for _ in self.rows())  # a file of one video holds many scenes

    def split(self, record: Record) -> Iterator[Record]:
        scenes = record.fields.get("data") if isinstance(record.fields, dict) else None
        if not isinstance(scenes, dict):
            yield record
            return
        for name, scene in scenes.items():
            wrong = SampleError("wrong_type", f"expected an object, found {type(scene).__name__}")
            yield replace(record, where=f"scene {name}", fields=scene if isinstance(scene, dict) else wrong)

    def sample(self, record: Record) -> Sample:
        clip, meta, caption = (record.fields.get(name) for name in ("clip_id", "meta", "caption"))
        clip = as_text(clip, "clip_id")
        video = record.fields.get("video_id") or (meta.get("video_id") if isinstance(meta, dict) else None)
        video = as_text(video or clip.rpartition("-Scene-")[0], "video_id")
        if not isinstance(caption, dict):
            raise SampleError("wrong_type", f"caption: expected an object, found {type(caption).__name__}")
        media = self.path(video, f"{clip}.mp4" if clip else "")
        return Sample((media,), {"assistant": as_text(caption.get("content"), "caption.content")})
