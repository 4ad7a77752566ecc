"""Log-probabilities of chosen tokens in many texts about shared clips, packed: the engine under multiple choice.

A request is one clip, the texts laid out around it, and the tokens to score, each belonging to a group (an option, or a
candidate word at a place). All texts of a request share the clip's frames, so that vision runs once a clip. Packs and
their shapes follow from all requests together and not from ranks, so the scores do not depend on the rank count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from fvlm.data.batch import LoadedSample, collate
from fvlm.data.chat import Text, Visual
from fvlm.data.errors import SampleError
from fvlm.data.plan import Capacities
from fvlm.evaluate.items import Presentation
from fvlm.evaluate.ranks import gather_over_ranks, rank_and_world
from fvlm.evaluate.validation import evaluating
from fvlm.model.packed import PackedBatch

Segments = list[Text | Visual]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to score on one clip."""

    key: str
    num_frames: int
    read_frames: Callable[[], np.ndarray]
    """Gives uint8 [num_frames, 3, H, W] when its pack is made; may raise SampleError."""
    texts: list[Segments]
    targets: list[np.ndarray]
    """One a text: int64 [m, 4] rows (segment, place in it, token, group): the log-probability of `token` at that place,
    given all before it, counts for `group`. The place has to lie after the text's first row."""
    num_groups: int


@dataclass(frozen=True)
class Scores:
    """float64 [groups] sums of log p, in nats, and int64 [groups] tokens in each sum."""

    logprob: np.ndarray
    tokens: np.ndarray


def answer_targets(text: Segments, group: int) -> np.ndarray:
    """Targets [m, 4]: every answer token of a text, its end-of-turn included, in one group."""
    rows = [
        (index, place, part.token_ids[place], group)
        for index, part in enumerate(text)
        if isinstance(part, Text)
        for place in np.flatnonzero(part.is_answer)
    ]
    return np.array(rows, np.int64).reshape(-1, 4)


def score(
    model: nn.Module,
    requests: Sequence[Request],
    *,
    presentation: Presentation,
    device: torch.device | str,
    mode: str = "coarse_fine",
    fine_iterations: int = 1,
    token_budget: int = 4096,
) -> tuple[list[Scores | None], Counter]:
    """Scores all requests; every rank passes the same list and gets all results.

    Args:
        token_budget: rows a pack is filled to; a longer request gets a pack of its own.

    Returns:
        One `Scores` a request, None where its frames could not be read, and the reasons, counted.

    Raises:
        ValueError: a score is not finite (names the request).
    """
    grid = presentation.grid
    packs = group_requests(requests, grid, token_budget)
    capacities, num_labels = _capacities(requests, packs, grid)
    rank, world = rank_and_world()
    found: dict[int, Scores] = {}
    lost: dict[int, str] = {}
    with evaluating(model):
        # All ranks run equally many packs: a sharded model communicates inside every forward pass.
        for first in range(0, len(packs), world):
            pack = packs[min(first + rank, len(packs) - 1)]
            batch, owners, unread = _collate(requests, pack, capacities, num_labels, presentation)
            out = model(batch=batch.to(device), mode=mode, fine_iterations=fine_iterations)
            found.update(_sum_groups(requests, out.logprobs.double().cpu().numpy(), owners))
            lost.update(unread)
    for other_found, other_lost in gather_over_ranks((found, lost)):
        found.update(other_found)
        lost.update(other_lost)
    return [found.get(index) for index in range(len(requests))], Counter(lost.values())


def group_requests(requests: Sequence[Request], grid: int, token_budget: int) -> list[list[int]]:
    """Consecutive requests filled into packs of at most `token_budget` rows, at least one request a pack."""
    packs: list[list[int]] = []
    filled = 0
    for index, request in enumerate(requests):
        size = sum(_lengths(text, grid).sum() for text in request.texts)
        if not packs or filled + size > token_budget:
            packs.append([])
            filled = 0
        packs[-1].append(index)
        filled += size
    return packs


def _lengths(text: Segments, grid: int) -> np.ndarray:
    """Rows of each segment."""
    cells = max(1, grid)
    return np.array([part.token_ids.size if isinstance(part, Text) else cells * len(part.frames) for part in text])


def _capacities(requests: Sequence[Request], packs: list[list[int]], grid: int) -> tuple[Capacities, int]:
    """The smallest shapes that hold every pack, so that one shape serves them all, and the most labels to score."""
    sizes = np.array([np.sum([_size(requests[index], grid) for index in pack], axis=0) for pack in packs])
    frames, tokens, visual, coarse, samples, answers, labels = np.maximum(1, sizes.max(axis=0, initial=1)).tolist()
    longest = max((int(_lengths(text, grid).sum()) for request in requests for text in request.texts), default=1)
    capacities = Capacities(
        frames=frames, tokens=tokens, visual=visual, coarse=coarse, samples=samples, labels=answers, max_seqlen=longest
    )
    return capacities, labels


def _size(request: Request, grid: int) -> np.ndarray:
    """[frames, tokens, visual, coarse, samples, answer tokens, labels to score] of a request."""
    total = np.array([request.num_frames, 0, 0, 0, len(request.texts), 0, sum(map(len, request.targets))])
    for text in request.texts:
        lengths = _lengths(text, grid)
        visual = np.array([isinstance(part, Visual) for part in text])
        last = np.flatnonzero(visual)[-1] + 1 if visual.any() else 0
        answers = sum(int(part.is_answer.sum()) for part in text if isinstance(part, Text))
        total[1:4] += lengths.sum(), lengths[visual].sum(), lengths[:last].sum()
        total[5] += answers
    return total


def _collate(
    requests: Sequence[Request], pack: list[int], capacities: Capacities, num_labels: int, presentation: Presentation
) -> tuple[PackedBatch, np.ndarray, dict[int, str]]:
    """A pack, the owners int64 [k, 2] (request, group) of its first k labels, and the requests that were unreadable."""
    samples, rows, unread = [], [], {}
    start = 0
    for index in pack:
        request = requests[index]
        try:
            frames = request.read_frames()
        except SampleError as error:
            unread[index] = error.reason
            continue
        for text, targets in zip(request.texts, request.targets, strict=True):
            samples.append(LoadedSample(key=request.key, segments=text, frames=frames, source_id=0))
            lengths = _lengths(text, presentation.grid)
            begins = start + np.concatenate([[0], np.cumsum(lengths)[:-1]])
            place = begins[targets[:, 0]] + targets[:, 1]
            owner = np.full(len(targets), index)
            rows.append(np.stack([place - 1, targets[:, 2], owner, targets[:, 3]], axis=1))
            start += lengths.sum()
    batch = collate(samples, capacities, "ce_answer", presentation.image_size, presentation.grid)
    wanted = np.concatenate(rows) if rows else np.zeros((0, 4), np.int64)
    # More labels than rows are allowed: several candidates are read off one row.
    loss_index, labels = batch.loss_index.new_zeros(num_labels), batch.labels.new_full((num_labels,), -100)
    loss_index[: len(wanted)] = torch.from_numpy(wanted[:, 0].copy())
    labels[: len(wanted)] = torch.from_numpy(wanted[:, 1].copy())
    return replace(batch, loss_index=loss_index, labels=labels), wanted[:, 2:], unread


def _sum_groups(requests: Sequence[Request], logprobs: np.ndarray, owners: np.ndarray) -> dict[int, Scores]:
    found = {}
    for index in np.unique(owners[:, 0]).tolist():
        own = owners[:, 0] == index
        groups, count = owners[own, 1], requests[index].num_groups
        sums = np.bincount(groups, weights=logprobs[: len(owners)][own], minlength=count)
        if not np.isfinite(sums).all():
            raise ValueError(f"request {requests[index].key!r}: non-finite score {sums.tolist()}; check the checkpoint")
        found[index] = Scores(sums, np.bincount(groups, minlength=count))
    return found
