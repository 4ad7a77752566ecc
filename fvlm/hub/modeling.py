"""The models as `AutoModel` loads them: the product's own, read and written by transformers' loader.

That loader brings `dtype`, `device_map`, revisions and quantisation, and knows DINOv2's published parameter names;
`VisionLanguageModel.from_pretrained` reads runs, checkpoints and published `.pt` files.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from ..model.fvlm import FoveatedVLM
from ..model.multi_token import MultiTokenVLM
from ..model.stream import FoveatedStream


class _FromHub:
    """transformers' loading and saving in place of the product's."""

    from_pretrained = classmethod(PreTrainedModel.from_pretrained.__func__)
    save_pretrained = PreTrainedModel.save_pretrained


class FoveatedModel(_FromHub, FoveatedVLM):
    """One looked-up token a frame."""


class MultiTokenModel(_FromHub, MultiTokenVLM):
    """The control: pooled grid cells of a frame as tokens, no query."""


__all__ = ["FoveatedModel", "FoveatedStream", "MultiTokenModel"]
