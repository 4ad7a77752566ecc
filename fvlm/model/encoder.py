"""DINOv2 as a memory that queries look into (docs/model.md, Encoder).

Shapes: F frames, N keys a frame (CLS + patches), V queries, D width, h heads, k = D/h head width, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Dinov2Model
from transformers.utils import ModelOutput

from ..kernels.query_attention import frame_offsets, query_attention
from ..kernels.query_attention.reference import attention_weights
from .configuration import FoveatedConfig

# ImageNet statistics, as DINOv2's preprocessor states them
PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)


@dataclass
class EncodedFrames(ModelOutput):
    """Everything later passes need of the frames; a mapping, in which an engine's hooks find the tensors."""

    layer_keys: list[Tensor] | None = None
    """Per layer that queries read: [F, N, h, k]."""
    layer_values: list[Tensor] | None = None
    coarse: Tensor | None = None
    """[F, D]: what the coarse query, which rode along, saw in each frame, after the output projection."""
    features: Tensor | None = None
    """[F, N, D]: normalised output of the last block, where it was asked for."""


class Look(NamedTuple):
    """What queries saw."""

    z: Tensor
    """[V, D], after the output projection."""
    entropy: Tensor | None
    """[V] nats, mean over layers and heads."""
    maps: Tensor | None
    """float32 [V, L, h, N] attention weights."""


class Projections(NamedTuple):
    """A DINOv2 block's attention projections, under whichever names the installed transformers gives them."""

    q: nn.Linear
    k: nn.Linear
    v: nn.Linear
    o: nn.Linear


def projections(layer: nn.Module) -> Projections:
    """q, k, v, o of a ``Dinov2Layer``: flat names since transformers 5.2x, nested ones before."""
    attention = layer.attention
    if hasattr(attention, "q_proj"):
        return Projections(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    inner = attention.attention
    return Projections(inner.query, inner.key, inner.value, attention.output.dense)


class FoveatedEncoder(nn.Module):
    """DINOv2 whose blocks' keys and values answer queries.

    Args:
        config: geometry.
        dino: a loaded backbone; random weights from ``config.vision_config`` if None.
    """

    def __init__(self, config: FoveatedConfig, dino: Dinov2Model | None = None):
        super().__init__()
        self.dino = dino if dino is not None else Dinov2Model(config.vision_config)
        if self.dino.embeddings.mask_token is not None:
            self.dino.embeddings.mask_token.requires_grad_(False)  # only DINOv2's own pre-training uses it
        width = config.vision_config.hidden_size
        self.deep = config.deep_query
        self.num_heads = config.vision_config.num_attention_heads
        self.output_proj = nn.Linear(width, width)
        learnable = config.query_logit_scale == "learnable"
        self.query_logit_scale = nn.Parameter(torch.ones(1)) if learnable else config.query_logit_scale
        if config.architecture == "foveated":
            self.query_input_proj = nn.Linear(config.query_dim, width, bias=False)
        self.recomputed = (False,) * len(self.dino.encoder.layer)
        """For each block, whether the backward pass computes it again."""

    def compile_blocks(self, backend: str = "inductor") -> None:
        """See :meth:`VisionLanguageModel.compile_blocks`."""
        self._run_block, self._query_block = (
            torch.compile(block, backend=backend, fullgraph=True, dynamic=False)
            for block in (self._run_block, self._query_block)
        )

    # -- frames ---------------------------------------------------------------------------------------------------

    def forward(self, frames: Tensor, coarse_query: Tensor | None = None, features: bool = False) -> EncodedFrames:
        """Run DINOv2 once over distinct frames.

        Args:
            frames: uint8 [F, 3, H, W] pixels, or floating point and already normalised.
            coarse_query: [1, q]; rides through every block as one more row that nobody attends to (deep mode).
            features: also compute the last block's output, which in deep mode nobody else needs.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trains):
            x = self.embed(frames)
        num_keys = x.shape[1]
        rides = coarse_query is not None and self.deep and self.trains
        if rides:
            rider = self.query_input_proj(coarse_query).to(x.dtype).expand(len(x), 1, -1)
            x = torch.cat([x, rider], dim=1)
        keys, values = [], []
        trains = self.trains
        for index, layer in enumerate(self.dino.encoder.layer):
            last = self.deep and not features and index == len(self.dino.encoder.layer) - 1
            with torch.set_grad_enabled(torch.is_grad_enabled() and trains):
                x, key, value = self._run_block(layer, x, num_keys, last, self.recomputed[index])
            keys.append(key)
            values.append(value)
        encoded = EncodedFrames(layer_keys=keys, layer_values=values)
        if features or not self.deep:
            encoded["features"] = self.dino.layernorm(x[:, :num_keys])
        if not self.deep:
            encoded["layer_keys"], encoded["layer_values"] = self._shallow_keys(encoded.features)
        if rides:
            encoded["coarse"] = self._output(x[:, -1])
        elif coarse_query is not None:
            every_frame = torch.arange(len(frames), device=frames.device)
            encoded["coarse"] = self.look(coarse_query.expand(len(frames), -1), encoded, every_frame).z
        return encoded

    @property
    def trains(self) -> bool:
        """Whether any DINOv2 weight is trained; if not, frames leave no activations behind."""
        return any(p.requires_grad for p in self.dino.parameters())

    def embed(self, frames: Tensor) -> Tensor:
        """[F, 3, H, W] → [F, N, D]: patches, CLS, positions; for uint8, pixel statistics are in the weights."""
        embeddings = self.dino.embeddings
        projection = embeddings.patch_embeddings.projection
        weight, bias = projection.weight, projection.bias
        if frames.dtype == torch.uint8:
            # conv((x/255 − mean)/std) = conv'(x) with weights over 255·std and the mean's share taken off the bias
            # (in float32: the share is a sum of hundreds of products), and rounded once
            # by plain numbers: a tensor made of them here would be a copy to the device that the host waits for
            planes = weight.to(torch.promote_types(weight.dtype, torch.float32)).unbind(1)
            means = [w.sum((1, 2)) * (m / s) for w, m, s in zip(planes, PIXEL_MEAN, PIXEL_STD, strict=True)]
            bias = (bias - sum(means)).to(weight.dtype)
            weight = torch.stack([w / (255 * s) for w, s in zip(planes, PIXEL_STD, strict=True)], 1).to(weight.dtype)
        # a loaded pack's frames lie as JPEGs are decoded, pixel by pixel; converting them puts them into planes
        frames = frames.to(weight.dtype, memory_format=torch.contiguous_format)
        patches = F.conv2d(frames, weight, bias, stride=projection.stride).flatten(2).transpose(1, 2)
        x = torch.cat([embeddings.cls_token.expand(len(frames), -1, -1), patches], dim=1)
        return x + embeddings.interpolate_pos_encoding(x, frames.shape[2], frames.shape[3])

    def _run_block(
        self, layer: nn.Module, x: Tensor, num_keys: int, last: bool, recomputed: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        if recomputed and self.training and torch.is_grad_enabled():
            return checkpoint(self._block, layer, x, num_keys, last, use_reentrant=False)
        return self._block(layer, x, num_keys, last)

    def _block(self, layer: nn.Module, x: Tensor, num_keys: int, last: bool) -> tuple[Tensor, Tensor, Tensor]:
        """One pre-norm DINOv2 block over [F, N or N+1, D]; the row past N (the rider) reads but is never read.

        Returns the block's output (of the last block only the rider's row, if any), K and V [F, N, h, k].
        """
        proj = projections(layer)
        normed = layer.norm1(x)
        # projected for the rider too and cut off after: a cut before would copy all rows, once for K and once for V
        key = self._heads(proj.k(normed))[:, :num_keys]
        value = self._heads(proj.v(normed))[:, :num_keys]
        if last:
            x, normed = x[:, num_keys:], normed[:, num_keys:]
            if x.shape[1] == 0:
                return x, key, value
        q = self._heads(proj.q(normed))
        if self.query_scaled and x.shape[1] != num_keys:
            rider = 0 if last else num_keys
            q = torch.cat([q[:, :rider], q[:, rider:] * self.query_logit_scale], dim=1)
        seen = F.scaled_dot_product_attention(q.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        x = x + layer.layer_scale1(proj.o(seen.transpose(1, 2).flatten(2)))
        x = x + layer.layer_scale2(layer.mlp(layer.norm2(x)))
        return x, key, value

    @property
    def query_scaled(self) -> bool:
        """Whether query logits carry a temperature."""
        return isinstance(self.query_logit_scale, Tensor) or self.query_logit_scale != 1.0

    # -- queries --------------------------------------------------------------------------------------------------

    def look(
        self, query: Tensor, encoded: EncodedFrames, visual_frame: Tensor, entropy: bool = False, maps: bool = False
    ) -> Look:
        """What each query sees in its frame.

        Args:
            query: [V, q].
            encoded: the frames' keys and values.
            visual_frame: int64 [V], sorted: the frame of each query.
            entropy, maps: also return these.
        """
        u = self.query_input_proj(query)
        entropies, weights = [], []
        offsets = frame_offsets(visual_frame, len(encoded.layer_keys[0]))

        layers = self.dino.encoder.layer if self.deep else [None]
        for layer, key, value in zip(layers, encoded.layer_keys, encoded.layer_values, strict=True):
            if maps:
                weights.append(attention_weights(self._layer_query(layer, u), key, visual_frame))
            u, layer_entropy = self._query_block(layer, u, key, value, visual_frame, offsets)
            entropies.append(layer_entropy)
        return Look(
            self._output(u),
            torch.stack(entropies).mean((0, 2)) if entropy else None,
            torch.stack(weights, dim=1) if maps else None,
        )

    def _layer_query(self, layer: nn.Module | None, u: Tensor) -> Tensor:
        """[V, h, k]: what a layer's query asks, temperature included; without a layer (shallow mode), u itself."""
        q = self._heads(u if layer is None else projections(layer).q(layer.norm1(u)))
        return q * self.query_logit_scale if self.query_scaled else q

    def _query_block(self, layer, u, key, value, visual_frame, offsets) -> tuple[Tensor, Tensor]:
        """One block for queries u [V, D] over a frame's K and V: what they are after it, and their entropy [V, h]."""
        seen, _, entropy = query_attention(self._layer_query(layer, u), key, value, visual_frame, offsets)
        if layer is None:
            return seen.flatten(1), entropy
        u = u + layer.layer_scale1(projections(layer).o(seen.flatten(1)))
        return u + layer.layer_scale2(layer.mlp(layer.norm2(u))), entropy

    def _output(self, u: Tensor) -> Tensor:
        return self.output_proj(self.dino.layernorm(u))

    def _shallow_keys(self, features: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        layer = self.dino.encoder.layer[-1]
        proj, normed = projections(layer), layer.norm1(features)
        return [self._heads(proj.k(normed))], [self._heads(proj.v(normed))]

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))
