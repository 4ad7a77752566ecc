"""Attention of a few queries per frame over that frame's keys."""

from .op import frame_offsets, query_attention

__all__ = ["frame_offsets", "query_attention"]
