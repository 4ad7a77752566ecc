"""How often each stream's turn comes: the shares that a mixture gives, within its caps. Pure functions of counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from fvlm.data.mixture import MixtureConfig

SCALE = 1 << 30
"""Of weights that stand for shares."""
_TOLERANCE = 1e-9


class NobodyLeftError(ValueError):
    """Caps that keep all streams of a group from its share."""


class Stream(Protocol):
    """Samples of one source, alike in kind and in capped tags."""

    source_name: str
    kind: str
    """`text` or `frames`; where the mixture states shares of kinds, one of `fvlm.data.shard.KINDS`."""
    tags: tuple[str, ...]
    """Those of the mixture's capped tags that the samples carry."""
    size: int


@dataclass(frozen=True, slots=True)
class Group:
    """Streams that have a stated share together."""

    name: str
    share: float
    members: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Limit:
    """The most that some streams contribute together: a share of the samples drawn, or a number of samples."""

    key: str
    """Where the mixture states it."""
    most: float
    members: frozenset[int]


def stream_groups(streams: Sequence[Stream], mixture: MixtureConfig) -> list[Group]:
    """The streams with a weight, by what the mixture states shares of; the shares sum to 1."""
    drawn = [i for i, s in enumerate(streams) if mixture.weights is None or mixture.weights[s.source_name]]
    if mixture.kinds is not None:
        total = sum(mixture.kinds.values())
        groups = [
            Group(kind, share / total, tuple(i for i in drawn if streams[i].kind == kind))
            for kind, share in mixture.kinds.items()
        ]
    elif mixture.text_share is not None:
        text = tuple(i for i in drawn if streams[i].kind == "text")
        framed = tuple(i for i in drawn if streams[i].kind != "text")
        groups = [Group("text", mixture.text_share, text), Group("frames", 1 - mixture.text_share, framed)]
    else:
        groups = [Group("all", 1.0, tuple(drawn))]
    return [group for group in groups if group.share]


def share_limits(streams: Sequence[Stream], mixture: MixtureConfig) -> list[Limit]:
    """Caps on shares, of sources and of tags."""
    sources = [(f"caps.{name}", cap, name) for name, cap in (mixture.caps or {}).items() if cap < 1]
    limits = [Limit(key, cap, _of_source(streams, name)) for key, cap, name in sources]
    for tag, cap in (mixture.tag_caps or {}).items():
        limits.append(Limit(f"tag_caps.{tag}", cap, frozenset(i for i, s in enumerate(streams) if tag in s.tags)))
    return [limit for limit in limits if limit.members]


def sample_limits(streams: Sequence[Stream], mixture: MixtureConfig) -> list[Limit]:
    """Caps on numbers of samples, and repeats."""
    caps = [(f"caps.{name}", cap, name) for name, cap in (mixture.caps or {}).items() if cap >= 1]
    limits = [Limit(key, int(cap), _of_source(streams, name)) for key, cap, name in caps]
    for name, repeats in (mixture.repeats or {}).items():
        members = _of_source(streams, name)
        limits += [Limit(f"repeats.{name}", repeats * streams[i].size, frozenset([i])) for i in members]
    return limits


def stream_weights(streams: Sequence[Stream], mixture: MixtureConfig, alive: set[int]) -> dict[int, int]:
    """Integer weights of the streams in `alive`: the mixture's, split within a source by size; or the sizes themselves.

    Of a source with a capped number of samples the size is that number, so that it is spread over the epoch.
    """
    sizes: dict[str, int] = {}
    for i in sorted(alive):
        sizes[streams[i].source_name] = sizes.get(streams[i].source_name, 0) + streams[i].size
    weights = {}
    for i in sorted(alive):
        name, size = streams[i].source_name, streams[i].size
        if mixture.weights is None:
            cap = (mixture.caps or {}).get(name, 0)
            weights[i] = max(size * int(cap) // sizes[name], 1) if 1 <= cap < sizes[name] else size
        else:
            share = mixture.weights[name] / sum(mixture.weights.values()) * size / sizes[name]
            weights[i] = max(round(share * SCALE), 1)
    return weights


def capped_shares(groups: Sequence[Group], weights: dict[int, int], limits: Sequence[Limit]) -> dict[int, float]:
    """Stream → share of all samples drawn: each group's by weight; what a cap takes goes to the rest of the group.

    Raises NobodyLeftError where the caps leave a part of a group's share to nobody.
    """
    shares: dict[int, float] = {}
    fixed: set[int] = set()
    while True:
        for group in groups:
            members = [i for i in group.members if i in weights]
            free = [i for i in members if i not in fixed]
            room = group.share - sum(shares[i] for i in members if i in fixed)
            if not free and room > _TOLERANCE:
                keys = ", ".join(f"mixture.{limit.key}" for limit in limits if limit.members.intersection(members))
                raise NobodyLeftError(
                    f"{keys}: {room:.2%} of the samples ({group.name}) are left to nobody; raise a cap, or add sources"
                )
            total = sum(weights[i] for i in free)
            shares |= {i: room * weights[i] / total for i in free}
        for limit in limits:
            members = [i for i in limit.members if i in shares]
            share = sum(shares[i] for i in members)
            if share > limit.most + _TOLERANCE:
                shares |= {i: shares[i] * limit.most / share for i in members}
                fixed.update(members)
                break
        else:
            return shares


def _of_source(streams: Sequence[Stream], name: str) -> frozenset[int]:
    return frozenset(i for i, stream in enumerate(streams) if stream.source_name == name)
