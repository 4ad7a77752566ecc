"""Mixed samples of every layout, as rows, for tests of the packed path."""

from __future__ import annotations

import numpy as np
import torch

from fvlm.model.packed import PackedBatch, SampleRows, assemble

TEXT = -1


def sample(pieces: list[int | list[int]], rng: np.random.Generator, first_frame: int, vocabulary: int) -> SampleRows:
    """A sample from pieces: an int = that many text tokens, a list = looks at these of the sample's own frames."""
    tokens, frames, loss = [], [], []
    for piece in pieces:
        if isinstance(piece, int):
            tokens += rng.integers(3, vocabulary, piece).tolist()
            frames += [TEXT] * piece
            loss += (rng.random(piece) < 0.6).tolist()
        else:
            tokens += [0] * len(piece)
            frames += [first_frame + f for f in piece]
            loss += [False] * len(piece)
    first_text = frames.index(TEXT)
    loss[first_text] = False
    loss[len(loss) - 1] = True  # never a sample without loss tokens
    return SampleRows(token_ids=np.array(tokens), frame=np.array(frames), has_loss=np.array(loss))


KINDS: list[list[int | list[int]]] = [
    [[0, 1, 2, 3, 4], 9],  # video first
    [[0] * 8, 6],  # a still looked at eight times
    [5, [0, 1, 2], 7],  # question first
    [4, [0], 2, [1], 3, [2], 2],  # narrated
    [3, [0], 2, [1], 5],  # several images
    [11],  # text only
    [[0], 4],  # one frame
    [[0, 0, 1, 1, 2, 2], 5],  # two looks at each frame
]


def num_frames(pieces) -> int:
    """Distinct frames of a sample."""
    return 1 + max((max(piece) for piece in pieces if isinstance(piece, list)), default=-1)


def mixed(
    count: int, vocabulary: int, seed: int = 0, size: int = 56
) -> tuple[list[list], list[SampleRows], torch.Tensor]:
    """``count`` samples that go round the kinds, their rows, and the frames of all of them."""
    rng = np.random.default_rng(seed)
    kinds = [KINDS[i % len(KINDS)] for i in range(count)]
    starts = np.cumsum([0, *map(num_frames, kinds)])
    rows = [sample(kind, rng, int(start), vocabulary) for kind, start in zip(kinds, starts, strict=False)]
    frames = torch.from_numpy(rng.integers(0, 256, (int(starts[-1]), 3, size, size), dtype=np.uint8))
    return kinds, rows, frames


def pack(rows: list[SampleRows], frames: torch.Tensor, spare: int = 0) -> PackedBatch:
    """One pack with ``spare`` unused entries in every dimension, unused frames full of noise that must not matter."""
    noise = torch.randint(0, 256, (spare, *frames.shape[1:]), dtype=torch.uint8).to(frames.dtype)
    total = sum(len(r.token_ids) for r in rows)
    visual = sum(int((r.frame >= 0).sum()) for r in rows)
    labels = sum(int(r.has_loss.sum()) for r in rows)
    sizes = {
        "T": total + spare,
        "V": visual + spare + 1,
        "C": total + spare,
        "S": len(rows) + spare,
        "K": labels + spare,
    }
    longest = max(len(r.token_ids) for r in rows)
    batch = assemble(rows, torch.cat([frames, noise]), sizes, longest)
    batch.validate()
    return batch


def alone(row: SampleRows, frames: torch.Tensor) -> PackedBatch:
    """The same sample in a pack of its own, with only its own frames."""
    used = row.frame >= 0
    if not used.any():
        return pack([row], frames[:1])
    first = int(row.frame[used].min())
    last = int(row.frame[used].max())
    moved = SampleRows(token_ids=row.token_ids, frame=np.where(used, row.frame - first, TEXT), has_loss=row.has_loss)
    return pack([moved], frames[first : last + 1])
