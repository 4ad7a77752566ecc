"""Variants of `benchmarks/naive.py` on the way to the product: each is the one before it with one change more.

Settings that the product has anyway (kernels, compilation, optimizer, ZeRO stage) go on from `packed`. Its attention is
the product's `varlen_attention`; `FVLM_KERNELS=torch` keeps it to torch's own.

Shapes: those of `benchmarks/naive.py`; F distinct frames, V looks, K labels, T positions of all samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.naive import Batch, Memory, NaiveVLM, at_least_one, lay_out, normalise, pad
from fvlm.data.batch import LoadedSample
from fvlm.model import FoveatedVLM
from fvlm.model.base import ATTENTION
from fvlm.model.encoder import projections
from fvlm.model.packed import PackedBatch, SampleRows, assemble
from fvlm.train.preference import answer_logprobs

# -- keys and values once ----------------------------------------------------------------------------------------------


class KVOnce(NaiveVLM):
    """Queries look into the keys and values that DINOv2's own attention used."""

    def encode(self, frames: Tensor) -> Memory:
        """DINOv2 over the frames, its projections kept as they are made."""
        kept = []
        chosen = [proj for layer in self.encoder.dino.encoder.layer for proj in projections(layer)[1:3]]
        hooks = [proj.register_forward_hook(lambda _, __, made: kept.append(self.heads(made))) for proj in chosen]
        try:
            self.encoder.dino(frames)
        finally:
            for hook in hooks:
                hook.remove()
        return list(zip(kept[::2], kept[1::2], strict=True))


# -- stills once -------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class DistinctBatch(Batch):
    """A batch whose `frames` [F, 3, H, W] are distinct."""

    visual_frame: Tensor
    """int64 [V]: the frame of each look; 0 for the one look of a batch without frames."""


def collate_distinct(samples: Sequence[LoadedSample], objective: str) -> DistinctBatch:
    """`naive.collate` with every frame once, of a preference pair too."""
    frames, rows = distinct(samples, objective)
    looks = np.concatenate([row.frame[row.frame >= 0] for row in rows])
    looks = looks if len(looks) else np.zeros(1, np.int64)
    return DistinctBatch(frames=frames, visual_frame=torch.from_numpy(looks), **pad(rows))


def distinct(samples: Sequence[LoadedSample], objective: str) -> tuple[Tensor, list[SampleRows]]:
    """All frames once, float32 [F, 3, H, W], and the samples' positions with frames numbered among these."""
    first, frames, rows, used = {}, [], [], 0
    for sample in samples:
        if id(sample.frames) not in first:  # the answers of a pair share theirs
            first[id(sample.frames)] = used
            frames.append(normalise(sample.frames))
            used += len(sample.frames)
        row = lay_out(sample, objective)
        rows.append(replace(row, frame=np.where(row.frame >= 0, row.frame + first[id(sample.frames)], -1)))
    return at_least_one(torch.cat(frames)), rows


class StillsOnce(KVOnce):
    """A frame that is looked at several times is encoded once, and so is the static query's look at it."""

    collate = staticmethod(collate_distinct)

    def coarse_tokens(self, batch: DistinctBatch, memory: Memory) -> Tensor:
        """[V, d], from a look at each of the F frames."""
        return super().coarse_tokens(batch, memory).index_select(0, batch.visual_frame)

    def fine_tokens(self, batch: DistinctBatch, memory: Memory, queries: Tensor) -> Tensor:
        """[V, d]."""
        at = batch.visual_frame
        return self.look(queries, [(key.index_select(0, at), value.index_select(0, at)) for key, value in memory])


# -- loss positions only -----------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class LossBatch(DistinctBatch):
    """A batch that knows where its labels are."""

    loss_row: Tensor
    """int64 [K]: the sample of each label."""
    loss_col: Tensor
    """int64 [K]: the position that predicts it."""


def collate_loss_positions(samples: Sequence[LoadedSample], objective: str) -> LossBatch:
    """`collate_distinct` with the labels' places."""
    batch = collate_distinct(samples, objective)
    loss_row, loss_col = (batch.labels != -100).nonzero(as_tuple=True)
    return LossBatch(**vars(batch), loss_row=loss_row, loss_col=loss_col)


class LossPositions(StillsOnce):
    """Logits where there is a label, nowhere else."""

    collate = staticmethod(collate_loss_positions)

    def sample_losses(self, batch: LossBatch, rows: Tensor) -> Tensor:
        """[B]."""
        trunk = self.llm.model(inputs_embeds=rows, attention_mask=batch.attention_mask, use_cache=False)
        at = batch.loss_row, batch.loss_col
        losses = F.cross_entropy(self.llm.lm_head(trunk.last_hidden_state[at]), batch.labels[at], reduction="none")
        return losses.new_zeros(len(rows)).index_add(0, batch.loss_row, losses)


# -- no padding --------------------------------------------------------------------------------------------------------


def collate_packed(samples: Sequence[LoadedSample], objective: str) -> PackedBatch:
    """The samples one after the other, in shapes that fit exactly; frames as in `collate_distinct`."""
    frames, rows = distinct(samples, objective)
    lengths = [len(row.token_ids) for row in rows]
    slots = [np.flatnonzero(row.frame >= 0) for row in rows]
    sizes = {
        "T": sum(lengths),
        "V": max(1, sum(len(of_sample) for of_sample in slots)),
        "C": max(1, sum(int(of_sample.max(initial=-1)) + 1 for of_sample in slots)),
        "S": len(rows),
        "K": max(1, sum(int(row.has_loss.sum()) for row in rows)),
    }
    return assemble(rows, frames, sizes, max(lengths))


class Packed(LossPositions):
    """All samples of a micro-batch in one row, each attending to itself; the coarse pass over true prefixes."""

    collate = staticmethod(collate_packed)

    def __init__(self, model: FoveatedVLM):
        super().__init__(model)
        self.llm.config._attn_implementation = ATTENTION

    def fill(self, batch: PackedBatch, text: Tensor, tokens: Tensor) -> Tensor:
        """[T+1, d]; the last row takes an empty frame's token."""
        return F.pad(text, (0, 0, 0, 1)).index_copy(0, batch.visual_index, tokens.to(text.dtype))

    def write_queries(self, batch: PackedBatch, rows: Tensor) -> Tensor:
        """[V, q]."""
        at, positions = batch.coarse_index, F.pad(batch.position_ids, (0, 1))
        hidden = self.trunk(batch, rows[at], positions[at], batch.coarse_cu_seqlens)
        written = self.llm_to_query(hidden[batch.query_from.clamp(min=0)])
        return torch.where(batch.query_from[:, None] >= 0, written, self.q_init.to(written.dtype))

    def sample_losses(self, batch: PackedBatch, rows: Tensor) -> Tensor:
        """[S]."""
        hidden = self.trunk(batch, rows[:-1], batch.position_ids, batch.cu_seqlens)
        logits = self.llm.lm_head(hidden[batch.loss_index])
        losses = F.cross_entropy(logits, batch.labels, ignore_index=-100, reduction="none")
        return answer_logprobs(losses, batch)

    def trunk(self, batch: PackedBatch, rows: Tensor, position_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        """The language model over packed rows, [rows, d] → [rows, d]."""
        return self.llm.model(
            inputs_embeds=rows[None],
            position_ids=position_ids[None],
            use_cache=False,
            cu_seqlens=cu_seqlens,
            max_seqlen=batch.max_seqlen,
        ).last_hidden_state[0]


LADDER: dict[str, type[NaiveVLM]] = {
    "naive": NaiveVLM,
    "kv_once": KVOnce,
    "stills_once": StillsOnce,
    "loss_positions": LossPositions,
    "packed": Packed,
}
"""From the baseline on, in the order in which the changes add up."""
