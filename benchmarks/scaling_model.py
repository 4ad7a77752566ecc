"""How a step's time grows with ranks: collectives on links with a latency, and buckets that wait for the link.

What is sent is `fvlm.train.traffic`'s, compute, optimizer and offload are `fvlm.train.work_model`'s or measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from fvlm.model.flops import Flops, flops_per_sample
from fvlm.train.gpus import Gpu
from fvlm.train.memory import REDUCED_AT_ONCE
from fvlm.train.planner import geometry_of, parameters_of
from fvlm.train.traffic import PASSES, REUSE_DISTANCE, Message, gathers_of, step_messages, use_order
from fvlm.train.work_model import ASSUMED_MFU, FILL, LINK_SHARE, SAMPLES, StepTime, step_time
from fvlm.train.zero_config import read_zero_json
from fvlm.train_config import CheckpointingConfig

CALL_SECONDS = 8.4e-6  # of a collective, before its first hop: `baseLat`, ring, Simple, in NCCL's tuning.cc
NVLINK_HOP, PCIE_HOP, NETWORK_HOP = 3.4e-6, 5.7e-6, 9.6e-6  # of each hop: `hwLat` of the same table
NETWORK_SHARE = 0.9  # of a network's rate that large collectives reach: 46 to 48 of 50 GB/s in nccl-tests issue 290
BUCKET = 500_000_000  # elements, where a DeepSpeed JSON names no `reduce_bucket_size`


@dataclass(frozen=True, kw_only=True)
class Link:
    """What ranks of one level are joined by."""

    rate: float
    """Bytes a second that one rank sends while it receives as many: what large messages reach."""
    hop: float
    """Seconds of each hop."""
    call: float = CALL_SECONDS
    """Seconds of a collective before its first hop."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Nodes of equal GPUs."""

    gpus: int
    """Of a node."""
    inside: Link
    nodes: int = 1
    between: Link | None = None
    """The network; its rate is a node's, shared by the node's GPUs."""

    @property
    def ranks(self) -> int:
        """Over all nodes."""
        return self.gpus * self.nodes


def nvlink(gpu: Gpu) -> Link:
    """What a card's table entry says, NVLink where it has any."""
    return Link(rate=gpu.link * LINK_SHARE, hop=NVLINK_HOP)


def pcie(gpu: Gpu) -> Link:
    """GPUs that reach one another over their PCIe slots only."""
    return Link(rate=gpu.host * LINK_SHARE, hop=PCIE_HOP)


def network(gigabits: float) -> Link:
    """A node's network of so many Gb/s."""
    return Link(rate=gigabits / 8 * 1e9 * NETWORK_SHARE, hop=NETWORK_HOP)


def ring_seconds(collective: str, size: float, ranks: int, link: Link) -> float:
    """Around a ring, in `PASSES` × (ranks − 1) hops that each carry size / ranks."""
    hops = PASSES[collective] * (ranks - 1)
    return link.call + hops * (link.hop + size / ranks / link.rate) if hops else 0.0


def tree_seconds(size: float, ranks: int, link: Link) -> float:
    """An all-reduce up and down a double binary tree: few hops, and the whole tensor through each link twice."""
    hops = 2 * math.ceil(math.log2(ranks))
    return link.call + hops * link.hop + 2 * size / link.rate if hops else 0.0


def seconds_of(collective: str, size: float, cluster: Cluster) -> float:
    """One collective of `size` bytes: within nodes, between them, within nodes again; the better of ring and tree.

    Each GPU of a node takes its share of the tensor to the other nodes, so a node's network carries the whole once a
    pass.
    """
    within = cluster.gpus, cluster.inside
    if cluster.nodes == 1:
        ring = ring_seconds(collective, size, *within)
        return min(ring, tree_seconds(size, *within)) if collective == "all_reduce" else ring
    across = ring_seconds(collective, size, cluster.nodes, cluster.between)
    if collective != "all_reduce":
        return ring_seconds(collective, size, *within) + across
    across = min(across, tree_seconds(size, cluster.nodes, cluster.between))
    return ring_seconds("reduce_scatter", size, *within) + across + ring_seconds("all_gather", size, *within)


def exposed_seconds(
    timeline: Sequence[tuple[float, int]], bucket: int, cost: Callable[[int], float], overlap: bool
) -> float:
    """How much longer a backward pass takes because its gradients travel.

    Args:
        timeline: (seconds of compute, elements whose gradients are complete after it), in order.
        bucket: elements that are sent together; a bucket goes as soon as the next gradient would not fit into it.
        cost: elements → seconds of the link.
        overlap: whether compute goes on meanwhile; buckets queue for the link either way.
    """
    now = free = 0.0
    waiting = 0

    def send(elements: int) -> None:
        nonlocal now, free
        free = max(now, free) + (cost(elements) if elements else 0.0)
        now = now if overlap else free

    for seconds, ready in timeline:
        now += seconds
        if waiting + ready > bucket:
            send(waiting)
            waiting = 0
        waiting += ready
    send(waiting)
    return max(now, free) - sum(seconds for seconds, _ in timeline)


def backward_timeline(flops: Flops, order: Sequence[tuple[str, int]], seconds: float) -> list[tuple[float, int]]:
    """When gradients are complete, for `exposed_seconds`: shares of a backward pass of `seconds`.

    Backwards: head, fine pass and queries, none of whose weights are complete before their other use; the coarse pass,
    layer by layer, with the embedding at its end; the encoder.
    """
    weights = dict(order)
    layers = [weights[name] for name in weights if name.startswith("llm")]
    encoder = [weights[name] + weights[name.replace("keys", "rows")] for name in weights if name.startswith("keys")]
    unit = seconds / flops.forward
    first = (unit * (flops.head + flops.fine_llm + flops.queries), 0)
    coarse = [(unit * flops.coarse_llm / len(layers), size) for size in reversed(layers)]
    frames = [(unit * flops.encoder / len(encoder), size) for size in reversed(encoder)]
    return [first, *coarse, (0.0, weights["embedding"]), *frames]


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is trained, and how."""

    model: str
    zero: str
    """Name of a DeepSpeed JSON."""
    gpu: Gpu
    stage: str = "stage2"
    """Whose mean sample, of `SAMPLES`."""
    tokens: int = 16384
    """Rows of a pack."""
    overlap: bool = False
    """DeepSpeed's `overlap_comm`; off in the repository's JSONs."""
    pack_seconds: float | None = None
    """Measured: forward and backward pass of a pack on one GPU; None: predicted from the assumed utilisation."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """Seconds of a step."""

    compute: float
    communication: float
    """That nothing hides."""
    rest: float
    """Optimizer and offload."""
    alone: float
    """Of the same packs on one GPU that holds everything, ZeRO-1 and no link."""

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.compute + self.communication + self.rest

    @property
    def efficiency(self) -> float:
        """Samples a second and GPU, over those of one GPU alone."""
        return self.alone / self.seconds


@cache
def _order(model: str) -> tuple[tuple[str, int], ...]:
    return tuple(use_order(geometry_of(model)))


@cache
def _gathers(model: str, distance: int) -> float:
    return gathers_of(_order(model), distance)


@cache
def _zero(name: str) -> dict[str, Any]:
    return read_zero_json(name)[0]


def work(run: Run, packs: int, ranks: int, zero: str | None = None) -> StepTime:
    """What `fvlm.train.work_model` says of `packs` packs a rank; a pack takes the measured time where there is one."""
    predicted = step_time(
        geometry_of(run.model), parameters_of(run.model), SAMPLES[run.stage], run.gpu, tokens=run.tokens,
        micro_batches=packs, ranks=ranks, zero=_zero(zero or run.zero), checkpointing=CheckpointingConfig(),
        num_ops=0, mfu=ASSUMED_MFU[run.model],
    )  # fmt: skip
    if run.pack_seconds is None:
        return predicted
    return replace(predicted, compute=packs * run.pack_seconds)


def simulate(run: Run, cluster: Cluster, packs: int) -> Step:
    """A step of `packs` packs on each rank."""
    parameters, zero = parameters_of(run.model), _zero(run.zero)
    section = zero.get("zero_optimization", {})
    found, alone = work(run, packs, cluster.ranks), work(run, packs, 1, "zero1")
    gathers = _gathers(run.model, section.get("stage3_max_reuse_distance", REUSE_DISTANCE))
    messages = step_messages(parameters, zero, "bf16", packs, gathers)
    bucket = section.get("reduce_bucket_size", BUCKET)
    communication = 0.0
    for message in messages:
        if message.moment == "step":
            at_once = 2.0 * (REDUCED_AT_ONCE if message.collective == "all_reduce" else bucket)
            communication += in_pieces(message, at_once, cluster)
        elif message.moment == "forward":  # prefetched, behind the forward pass at most
            seconds = in_pieces(message, 2.0 * section.get("stage3_prefetch_bucket_size", BUCKET), cluster)
            communication += max(0.0, seconds - found.compute / 3) if run.overlap else seconds
        else:
            flops = flops_per_sample(geometry_of(run.model), SAMPLES[run.stage])
            timeline = backward_timeline(flops, _order(run.model), found.compute / packs * 2 / 3)
            cost = _cost(message.collective, cluster)
            communication += packs * exposed_seconds(timeline, bucket, cost, run.overlap)
    return Step(
        compute=found.compute,
        communication=communication,
        rest=found.optimizer + found.offload,
        alone=alone.compute + alone.optimizer,
    )


def in_pieces(message: Message, at_once: float, cluster: Cluster) -> float:
    """Seconds of a message that goes in pieces of `at_once` bytes, one after the other."""
    pieces, rest = divmod(message.size, at_once)
    seconds = pieces * seconds_of(message.collective, at_once, cluster)
    return seconds + (seconds_of(message.collective, rest, cluster) if rest else 0.0)


def _cost(collective: str, cluster: Cluster) -> Callable[[int], float]:
    return lambda elements: seconds_of(collective, 2.0 * elements, cluster)


def samples_of_pack(run: Run) -> float:
    """Mean samples of a pack."""
    return FILL * run.tokens / SAMPLES[run.stage].tokens


def packs_for(run: Run, cluster: Cluster, efficiency: float, most: int = 64) -> int | None:
    """Fewest packs a rank and step that reach an efficiency; None where `most` do not."""
    return next((n for n in range(1, most + 1) if simulate(run, cluster, n).efficiency >= efficiency), None)
