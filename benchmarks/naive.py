"""The baseline: the model and its training step as one would first write them on transformers and torch.

A batch is padded to its longest sample; every look at a frame encodes that frame; DINOv2 and the language model run as
they come, eager; the queries' keys and values are projected from the layers' inputs; logits are made at all positions.
Weights, samples and loss are the product's (`tests/benchmarks/test_naive.py`). It is not developed further.

Shapes: B samples, L positions of the longest, n looks (at least 1: a batch without any brings one empty frame),
N keys a frame, h heads, k head width, D = DINOv2's width, q = query width, d = language model's width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fvlm.data.batch import LoadedSample
from fvlm.data.chat import Visual
from fvlm.model import FoveatedVLM
from fvlm.model.base import VisionLanguageModel
from fvlm.model.encoder import PIXEL_MEAN, PIXEL_STD, projections
from fvlm.model.packed import SampleRows
from fvlm.train.optimizer import hyperparameters, parameter_groups, set_rates
from fvlm.train.zero_config import resolve_dtype
from fvlm.train_config import TrainConfig

Memory = list[tuple[Tensor, Tensor]]
"""What queries look into: K and V of every DINOv2 layer, each [n, h, N, k]."""


# -- batch -------------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Batch:
    """Samples padded on the right to the longest of them."""

    frames: Tensor
    """float32 [n, 3, H, W], normalised: the frame of each look, sample by sample."""
    token_ids: Tensor
    """int64 [B, L]; 0 in visual slots and padding."""
    attention_mask: Tensor
    """bool [B, L]; False in padding."""
    labels: Tensor
    """int64 [B, L]: what the position predicts, already shifted; −100: nothing."""
    slot_row: Tensor
    """int64 [looks]: the sample of each visual slot; without the empty frame's."""
    slot_col: Tensor
    """int64 [looks]: its position."""
    prefix: int
    """Positions that the coarse pass needs: up to the last visual slot of any sample, at least 1."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch on another device."""
        return self._map(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory."""
        return self._map(lambda x: x.pin_memory())

    def _map(self, function) -> Batch:
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: function(x) for name, x in tensors.items() if isinstance(x, Tensor)})


def collate(samples: Sequence[LoadedSample], objective: str) -> Batch:
    """Pad samples; of `dpo` the chosen and the rejected answer of each pair, one after the other."""
    rows = [lay_out(sample, objective) for sample in samples]
    looks = [normalise(sample.frames)[row.frame[row.frame >= 0]] for sample, row in zip(samples, rows, strict=True)]
    return Batch(frames=at_least_one(torch.cat(looks)), **pad(rows))


def lay_out(sample: LoadedSample, objective: str) -> SampleRows:
    """A sample's positions in the order of its segments; frames are numbered within the sample."""
    tokens, frame, loss = [], [], []
    for part in sample.segments:
        if isinstance(part, Visual):
            tokens.append(np.zeros(len(part.frames), np.int64))
            frame.append(np.array(part.frames, np.int64))
            loss.append(np.zeros(len(part.frames), bool))
        else:
            tokens.append(part.token_ids.astype(np.int64))
            frame.append(np.full(len(part.token_ids), -1))
            loss.append(np.ones(len(part.token_ids), bool) if objective == "ce_all" else part.is_answer)
    frame, loss = np.concatenate(frame), np.concatenate(loss)
    loss[np.argmax(frame < 0)] = False  # a sample's first text token is nobody's label
    return SampleRows(token_ids=np.concatenate(tokens), frame=frame, has_loss=loss)


def pad(rows: Sequence[SampleRows]) -> dict:
    """`Batch`'s fields but the frames."""
    shape = len(rows), max(len(row.token_ids) for row in rows)
    token_ids, labels = np.zeros(shape, np.int64), np.full(shape, -100, np.int64)
    attention_mask, is_slot = np.zeros(shape, bool), np.zeros(shape, bool)
    for b, row in enumerate(rows):
        size = len(row.token_ids)
        token_ids[b, :size], attention_mask[b, :size] = row.token_ids, True
        labels[b, : size - 1] = np.where(row.has_loss, row.token_ids, -100)[1:]
        is_slot[b, :size] = row.frame >= 0
    slot_row, slot_col = is_slot.nonzero()
    arrays = {"token_ids": token_ids, "attention_mask": attention_mask, "labels": labels}
    arrays |= {"slot_row": slot_row, "slot_col": slot_col}
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return {**tensors, "prefix": int(slot_col.max(initial=0)) + 1}


def normalise(frames: np.ndarray) -> Tensor:
    """uint8 [n, 3, H, W] → float32, as DINOv2's preprocessor does."""
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (PIXEL_MEAN, PIXEL_STD))
    pixels = torch.from_numpy(frames).to(torch.float32, memory_format=torch.contiguous_format)
    return pixels.div_(255).sub_(mean).div_(std)


def at_least_one(frames: Tensor) -> Tensor:
    """The frames, or an empty one where there is none, so that every parameter gets a gradient."""
    return frames if len(frames) else frames.new_zeros(1, *frames.shape[1:])


# -- model -------------------------------------------------------------------------------------------------------------


class NaiveVLM(nn.Module):
    """The foveated model with copies of the product's weights, under the product's parameter names.

    Raises ValueError for geometries of the ablations.
    """

    collate = staticmethod(collate)
    """What makes this model's batches: (samples, objective) → batch."""

    def __init__(self, model: FoveatedVLM):
        super().__init__()
        config = model.config
        if not isinstance(model, FoveatedVLM) or not config.deep_query or config.random_queries:
            raise ValueError("the baseline is the foveated model with deep, learned queries: no other geometry")
        if config.query_logit_scale != 1:
            raise ValueError(f"query_logit_scale = {config.query_logit_scale}: expected 1, the baseline has no other")
        model = copy.deepcopy(model)
        parts = ("dino", "query_input_proj", "output_proj")
        self.encoder = nn.ModuleDict({name: getattr(model.encoder, name) for name in parts})
        self.llm, self.dino_to_llm, self.llm_to_query = model.llm, model.dino_to_llm, model.llm_to_query
        self.q_static, self.q_init = model.q_static, model.q_init
        self.llm.config._attn_implementation = "sdpa"
        self.visual_scale, self.num_heads = config.visual_scale, config.vision_config.num_attention_heads

    param_groups = VisionLanguageModel.param_groups

    def forward(self, batch: Batch) -> Tensor:
        """Σ −log p over each sample's labels: [B]."""
        memory = self.encode(batch.frames)
        text = self.llm.get_input_embeddings()(batch.token_ids)
        coarse = self.coarse_tokens(batch, memory)
        queries = self.write_queries(batch, self.fill(batch, text, coarse))
        fine = self.fine_tokens(batch, memory, queries)
        return self.sample_losses(batch, self.fill(batch, text, fine))

    def encode(self, frames: Tensor) -> Memory:
        """DINOv2 over the frames; K and V of its layers are projected from their inputs."""
        states = self.encoder.dino(frames, output_hidden_states=True).hidden_states
        memory = []
        for layer, state in zip(self.encoder.dino.encoder.layer, states[:-1], strict=True):
            normed, proj = layer.norm1(state), projections(layer)
            memory.append((self.heads(proj.k(normed)), self.heads(proj.v(normed))))
        return memory

    def coarse_tokens(self, batch: Batch, memory: Memory) -> Tensor:
        """The static query's look at every frame: [n, d]."""
        return self.look(self.q_static.expand(len(batch.frames), -1), memory)

    def fine_tokens(self, batch: Batch, memory: Memory, queries: Tensor) -> Tensor:
        """Each look's own query: [n, d]."""
        return self.look(queries, memory)

    def look(self, queries: Tensor, memory: Memory) -> Tensor:
        """Queries [n, q] through all layers, each at the frame of its row, to language-model tokens [n, d]."""
        u = self.encoder.query_input_proj(queries).unsqueeze(1)
        for layer, (key, value) in zip(self.encoder.dino.encoder.layer, memory, strict=True):
            proj = projections(layer)
            seen = F.scaled_dot_product_attention(self.heads(proj.q(layer.norm1(u))), key, value)
            u = u + layer.layer_scale1(proj.o(seen.transpose(1, 2).flatten(2)))
            u = u + layer.layer_scale2(layer.mlp(layer.norm2(u)))
        z = self.encoder.output_proj(self.encoder.dino.layernorm(u.squeeze(1)))
        return self.visual_scale * self.dino_to_llm(z)

    def heads(self, x: Tensor) -> Tensor:
        """[n, rows, D] → [n, h, rows, k]."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def fill(self, batch: Batch, text: Tensor, tokens: Tensor) -> Tensor:
        """[B, L, d]: the embedded text with tokens in the visual slots."""
        used = tokens[: len(batch.slot_row)].to(text.dtype)  # all but an empty frame's
        return text.index_put((batch.slot_row, batch.slot_col), used)

    def write_queries(self, batch: Batch, rows: Tensor) -> Tensor:
        """[n, q]: written by the position before each slot, in a pass over the longest visual prefix."""
        hidden = self.llm.model(
            inputs_embeds=rows[:, : batch.prefix],
            attention_mask=batch.attention_mask[:, : batch.prefix],
            use_cache=False,
        ).last_hidden_state
        first = self.q_init.expand(len(rows), 1, -1)
        shifted = torch.cat([first, self.llm_to_query(hidden)[:, :-1]], dim=1)
        queries = shifted[batch.slot_row, batch.slot_col]
        return F.pad(queries, (0, 0, 0, int(len(queries) == 0)))  # an empty frame's is zero

    def sample_losses(self, batch: Batch, rows: Tensor) -> Tensor:
        """Language model and cross-entropy over whole samples: [B]."""
        logits = self.llm(inputs_embeds=rows, attention_mask=batch.attention_mask, use_cache=False).logits
        losses = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-100, reduction="none")
        return losses.view_as(batch.labels).sum(1)


# -- training ----------------------------------------------------------------------------------------------------------


_ONLY = {"mode": "coarse_fine", "fine_iterations": (1,), "lambda_coarse": 0, "freeze": ()}
"""Settings of `TrainConfig` that the baseline knows one value of."""


class NaiveTrainer:
    """Training steps of `NaiveVLM` or a variant: torch's AdamW with the product's groups, decay and clipping.

    Parameters stay fp32; where the run's `dtype` comes out as bf16, autocast computes in it. Of `dpo` the reference is
    a frozen copy, run beside the model. `train.activation_checkpointing` is passed over: nothing is computed again.

    Args:
        model: with fp32 weights; moved to the device.
        train: the run's training section.
        device: where to train.
        batch_size: samples of a micro-batch, pairs of `dpo`.

    Raises:
        ValueError: settings of the ablations, naming the key.
    """

    def __init__(self, model: NaiveVLM, train: TrainConfig, device: torch.device | str, batch_size: int):
        for key, only in _ONLY.items():
            if getattr(train, key) != only:
                raise ValueError(f"train.{key} = {getattr(train, key)}: expected {only}, the baseline has no other")
        self.train, self.device, self.batch_size = train, torch.device(device), batch_size
        self.model = model.to(self.device).train()
        self.is_dpo = train.objective == "dpo"
        self.reference = copy.deepcopy(self.model).requires_grad_(False) if self.is_dpo else None
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, train), **hyperparameters(train))
        self.is_bf16 = resolve_dtype(train, self.device.type == "cuda") == "bf16"

    def step(self, samples: Sequence[LoadedSample], rates: Mapping[str, float], planned: int) -> Tensor:
        """`step_on` for samples that are still to be collated; of `dpo` two after each other are a pair."""
        return self.step_on(self.micro_batches(samples), rates, planned)

    def micro_batches(self, samples: Sequence[LoadedSample]) -> Iterator[Batch]:
        """A step's batches, on the host; the last one may be smaller. `collate` may as well run in loader processes."""
        size = self.batch_size * (2 if self.is_dpo else 1)
        for start in range(0, len(samples), size):
            yield self.model.collate(samples[start : start + size], self.train.objective)

    def step_on(self, batches: Iterable[Batch], rates: Mapping[str, float], planned: int) -> Tensor:
        """Forward, backward and update; returns the sum of losses over labels or pairs, a float32 scalar.

        Args:
            batches: of the step, on the host.
            rates: learning rate of each group.
            planned: labels or pairs of the step, by which the sum is divided.
        """
        set_rates(self.optimizer.param_groups, rates)
        total = torch.zeros((), device=self.device)
        for batch in batches:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.is_bf16):
                loss = self.loss_sum(batch.to(self.device, non_blocking=True))
            (loss / planned).backward()
            total += loss.detach()
        if self.train.clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.train.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total

    def loss_sum(self, batch: Batch) -> Tensor:
        """What a batch adds to the step's loss, before the division."""
        losses = self.model(batch)
        if self.reference is None:
            return losses.sum()
        with torch.no_grad():
            chosen, rejected = self.reference(batch).unflatten(0, (-1, 2)).unbind(1)
        margin = (chosen - rejected) - (losses[::2] - losses[1::2])  # of log π − log π_ref
        return F.softplus(-self.train.dpo_beta * margin).sum()
