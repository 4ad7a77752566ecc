"""A key/value cache in which a further token costs the same however many came before."""

from __future__ import annotations

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

LEAST_ROOM = 64


class GrowingLayer(DynamicLayer):
    """Keys and values [B, h, n, k] in room for twice as many: a token is written into it, all others stay.

    ``keys`` and ``values`` are views of that room. Where somebody else set them (beam search reorders, a fork shows
    another layer's), they are copied into room of their own by the next update.
    """

    def __init__(self) -> None:
        super().__init__()
        self.slot: int | None = None
        """Row that the next token takes in place of what it holds; None: a new one behind all others."""
        self._room: tuple[Tensor, Tensor] | None = None
        self._own: tuple[Tensor | None, Tensor | None] = (None, None)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Add [B, h, new, k]; returns all that is kept, with them."""
        states = (key_states, value_states)
        kept, new = self.get_seq_length(), key_states.shape[-2]
        owned = self._room is not None and self.keys is self._own[0] and self.values is self._own[1]
        if not owned or kept + new > self._room[0].shape[-2]:
            self._move(kept, new, states)
        begin = kept if self.slot is None else self.slot
        for room, added in zip(self._room, states, strict=True):
            room[:, :, begin : begin + new] = added
        self._own = self.keys, self.values = tuple(room[:, :, : max(kept, begin + new)] for room in self._room)
        return self.keys, self.values

    def _move(self, kept: int, new: int, states: tuple[Tensor, Tensor]) -> None:
        rows = max(LEAST_ROOM, 2 * (kept + new))
        self._room = tuple(x.new_empty(*x.shape[:2], rows, x.shape[3]) for x in states)
        if kept:
            for room, before in zip(self._room, (self.keys, self.values), strict=True):
                room[:, :, :kept] = before
        self.dtype, self.device, self.is_initialized = states[0].dtype, states[0].device, True


class GrowingCache(Cache):
    """A :class:`GrowingLayer` for each of ``num_layers`` decoder layers."""

    def __init__(self, num_layers: int):
        super().__init__(layers=[GrowingLayer() for _ in range(num_layers)])

    def put_next_into(self, slot: int | None) -> None:
        """The row of every layer that the next token takes in place of what it holds; None: a new row.

        Rotated keys carry their positions, so that their order in memory means nothing to the rows after them.
        """
        for layer in self.layers:
            layer.slot = slot

    def fork(self) -> GrowingCache:
        """Another cache that goes on from here, and leaves this one as it is."""
        other = GrowingCache(len(self.layers))
        for mine, its in zip(self.layers, other.layers, strict=True):
            if mine.is_initialized:
                its.keys, its.values, its.is_initialized = mine.keys, mine.values, True
                its.dtype, its.device = mine.dtype, mine.device
        return other
