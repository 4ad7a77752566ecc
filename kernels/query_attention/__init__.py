"""Attention of a few queries per frame over that frame's keys."""

from .op import query_attention

__all__ = ["query_attention"]
