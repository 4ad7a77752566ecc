"""One text at a time through the padded public forward: the slow way, with nothing of the packed path in it."""

from __future__ import annotations

import numpy as np
import torch

from fvlm.data.chat import Text, Visual

SHAPES = ("square", "circle", "triangle", "cross", "ring", "diamond", "bar", "moon")


def logprobs(model, item, text, **call) -> tuple[torch.Tensor, list[int]]:
    """Log-probabilities float64 [L, vocabulary] that predict each text token of a chat with its frames in one place.

    The first row means nothing. Returns them with the token ids.
    """
    ids = [int(i) for part in text if isinstance(part, Text) for i in part.token_ids]
    looked_at = [i for part in text if isinstance(part, Visual) for i in part.frames]
    before = [part.token_ids.size for part in text[: len(text) - 1] if isinstance(part, Text)]
    assert len(text) <= 3, "video first, question first or text only"
    at = sum(before)
    frames = torch.from_numpy(item.read_frames()[looked_at] if looked_at else np.zeros((0, 3, 56, 56), np.uint8))
    with torch.no_grad():
        place = {"visual_at": torch.tensor([at])}
        logits = model(frames=frames[None], input_ids=torch.tensor([ids]), **place, **call).logits[0]
    table = torch.log_softmax(logits.double(), -1)
    shifted = torch.cat([table.new_zeros(1, table.shape[1]), table[:-1]])
    return torch.cat([shifted[:at], shifted[at + len(looked_at) :]]), ids


def answer_places(text) -> np.ndarray:
    """Places of the answer tokens, end-of-turn included, among the text tokens."""
    return np.flatnonzero(np.concatenate([part.is_answer for part in text if isinstance(part, Text)]))


def answer_logprob(model, item, text, **call) -> float:
    """Σ log p of the answer tokens."""
    table, ids = logprobs(model, item, text, **call)
    return float(sum(table[place, ids[place]] for place in answer_places(text)))
