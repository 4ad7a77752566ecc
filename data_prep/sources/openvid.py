"""OpenVid-1M: clips with long captions.

`OpenVid-1M.csv`: video, caption, aesthetic score, motion score, temporal consistency score, camera motion, frame, fps,
seconds (names with spaces). The clips come in zip files, to be unpacked into one folder without their own folders
(`unzip -j`): that folder is `--media`. `OpenVidHD.csv` repeats rows of the first, and is read only if it is named.
"""

from __future__ import annotations

from data_prep.sources.base import PublishedSource, Sample
from data_prep.sources.files import Record


class OpenVid(PublishedSource):
    """One row a clip."""

    NAME = "openvid"
    LICENCE = "CC-BY-4.0; the videos under the licences of Panda-70M, ChronoMagic, Open-Sora-Plan and CelebV-HQ"
    CITATION = (
        "Nan et al., OpenVid-1M: A Large-Scale High-Quality Dataset for Text-to-video Generation, arXiv:2407.02371"
    )
    HOMEPAGE = "https://huggingface.co/datasets/nkp37/OpenVid-1M"
    FILES = ("OpenVid-1M.csv", "data/train/OpenVid-1M.csv")
    ID = "video"

    def sample(self, record: Record) -> Sample:
        video = self.text(record, "video")
        video += ".mp4" if video and not video.lower().endswith(".mp4") else ""
        return Sample((self.path(video),), {"assistant": self.text(record, "caption")})
