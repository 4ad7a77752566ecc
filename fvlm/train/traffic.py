"""What DeepSpeed sends between ranks in a step, by ZeRO stage: collectives with their bytes.

Read off DeepSpeed 0.19.8 and counted on real ranks, call by call (`python -m benchmarks.scaling --count`,
tests/benchmarks/test_scaling.py). Sums of a few numbers (norms, flags) are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fvlm.model import FoveatedConfig
from fvlm.train.memory import Parameters
from fvlm.train.zero_config import zero_stage

REUSE_DISTANCE = 1_000_000_000  # ZeRO-3's `stage3_max_reuse_distance`, unless the JSON says otherwise
PASSES = {"all_reduce": 2, "reduce_scatter": 1, "all_gather": 1}
"""How often the whole tensor, but for one rank's share, goes through each rank's link."""


@dataclass(frozen=True, kw_only=True)
class Message:
    """Collectives of one kind in a step of one rank, all together."""

    collective: str
    """`all_reduce`, `reduce_scatter` or `all_gather`."""
    size: float
    """Bytes of the whole tensors, before they are scattered or after they are gathered."""
    moment: str
    """`backward` (of every micro-batch), `forward` (of every one, where gathers are counted for both passes) or `step`
    (once, at its end)."""

    def sent(self, ranks: int) -> float:
        """Bytes that each rank sends, and receives, whatever algorithm wastes none (ring, or reduce and gather)."""
        return PASSES[self.collective] * (ranks - 1) / ranks * self.size


def step_messages(
    parameters: Parameters,
    zero: Mapping[str, Any],
    dtype: str,
    micro_batches: int,
    gathers: float = 1.0,
    persistent: int = 0,
) -> list[Message]:
    """What a step of `micro_batches` packs a rank sends.

    Gradients are summed over micro-batches in fp32, yet travel in the weights' precision, in every stage. ZeRO-2 does
    not scatter them: it all-reduces each bucket and keeps a rank's share, whatever its JSON's `reduce_scatter` says.

    Args:
        parameters: of the model.
        zero: contents of a DeepSpeed JSON.
        dtype: `bf16` or `fp32`.
        micro_batches: packs of each rank.
        gathers: how often ZeRO-3 gathers the weights for one micro-batch (`gathers_of`).
        persistent: elements that ZeRO-3 keeps whole, since they are below `stage3_param_persistence_threshold`, and
            gathers once a step; next to nothing in any published model.
    """
    stage = zero_stage(dict(zero), dtype)
    whole = float((2 if dtype == "bf16" else 4) * parameters.trained)
    if stage == 0:
        return [Message(collective="all_reduce", size=whole, moment="step")]
    handed_out = Message(collective="all_gather", size=whole, moment="step")
    if stage == 1:
        return [Message(collective="all_reduce", size=whole, moment="step"), handed_out]
    if stage == 2:
        return [Message(collective="all_reduce", size=micro_batches * whole, moment="backward"), handed_out]
    kept = whole * persistent / parameters.trained
    return [
        Message(collective="all_gather", size=micro_batches * gathers * (whole - kept), moment="forward"),
        Message(collective="all_gather", size=kept, moment="step"),
        Message(collective="reduce_scatter", size=micro_batches * whole, moment="backward"),
    ]


def sent(messages: Sequence[Message], ranks: int) -> float:
    """Bytes that each rank sends in a step."""
    return sum(message.sent(ranks) for message in messages)


def use_order(geometry: FoveatedConfig) -> list[tuple[str, int]]:
    """(name, elements) of the large weights in the order in which a micro-batch uses them, both passes.

    Frames go through the encoder, the coarse pass through the language model, its queries through the encoder's layers
    again (all but the projections of K and V), the fine pass through the language model; then all of it backwards.
    """
    llm, vision = geometry.llm_config, geometry.vision_config
    head_dim = getattr(llm, "head_dim", None) or llm.hidden_size // llm.num_attention_heads
    attention = llm.hidden_size * head_dim * 2 * (llm.num_attention_heads + llm.num_key_value_heads)
    layer = attention + 3 * llm.hidden_size * llm.intermediate_size
    width = vision.hidden_size
    embedding = [("embedding", llm.vocab_size * llm.hidden_size)]
    language = [(f"llm {i}", layer) for i in range(llm.num_hidden_layers)]
    keys = [[(f"keys {i}", 2 * width**2)] for i in range(vision.num_hidden_layers)]
    rows = [[(f"rows {i}", (2 + 2 * vision.mlp_ratio) * width**2)] for i in range(vision.num_hidden_layers)]
    frames = [part for key, row in zip(keys, rows, strict=True) for part in key + row]
    queries = [part for row in rows for part in row]
    forward = frames + embedding + language + queries + language  # the head reads the embedding without its module
    return forward + forward[::-1]


def gathers_of(order: Sequence[tuple[str, int]], reuse_distance: int = REUSE_DISTANCE) -> float:
    """How often ZeRO-3 gathers the weights for one micro-batch, as a multiple of all of them.

    Weights that are not gathered are fetched where they are used, and let go after it unless they are used again within
    the next `reuse_distance` elements; at the end of a micro-batch those of the next are unknown, and all are let go.
    """
    there: set[str] = set()
    fetched = 0
    for place, (name, size) in enumerate(order):
        fetched += 0 if name in there else size
        there.add(name)
        if not _used_again(name, order[place + 1 :], reuse_distance):
            there.discard(name)
    return fetched / sum(dict(order).values())


def _used_again(name: str, order: Sequence[tuple[str, int]], distance: int) -> bool:
    passed = 0
    for later, size in order:
        if passed >= distance:
            return False
        if later == name:
            return True
        passed += size
    return False
