"""Causal self-attention over packed samples."""

from .op import varlen_attention

__all__ = ["varlen_attention"]
