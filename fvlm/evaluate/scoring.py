"""Log-probabilities of chosen tokens in many texts about shared clips, packed: the engine under multiple choice.

A request is one clip, the texts laid out around it, and the tokens to score, each belonging to a group (an option, or a
candidate word at a place). What the texts of a request share (the frames, and all rows before they differ) is one
sample of a pack and computed once; where they differ they go on from it as branches. Packs and their shapes follow from
all requests together and not from ranks, so the scores do not depend on the rank count.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from fvlm.data.batch import LoadedSample, collate
from fvlm.data.chat import Text, Visual
from fvlm.data.errors import SampleError
from fvlm.data.plan import Capacities
from fvlm.evaluate.items import Presentation, segment_lengths
from fvlm.evaluate.ranks import gather_over_ranks, rank_and_world
from fvlm.evaluate.validation import evaluating
from fvlm.model.branches import Branches
from fvlm.model.packed import PackedBatch

logger = logging.getLogger(__name__)
Segments = list[Text | Visual]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to score on one clip."""

    key: str
    num_frames: int
    read_frames: Callable[[], np.ndarray]
    """Gives uint8 [num_frames, 3, H, W] when its pack is made; may raise SampleError."""
    texts: list[Segments]
    """The same up to and with the last frame."""
    targets: list[np.ndarray]
    """One a text: int64 [m, 4] rows (segment, place in it, token, group): the log-probability of `token` at that place,
    given all before it, counts for `group`. The place has to lie after the text's first row."""
    num_groups: int


@dataclass(frozen=True)
class Scores:
    """float64 [groups] sums of log p, in nats, and int64 [groups] tokens in each sum."""

    logprob: np.ndarray
    tokens: np.ndarray


@dataclass(frozen=True, kw_only=True)
class _Tree:
    """A request's texts as rows: what all share, then what each has of its own."""

    shared: Segments
    num_shared: int
    """Rows of it."""
    token_ids: np.ndarray
    """int64 [b]: the texts' own rows, one text after the other."""
    text: np.ndarray
    """int64 [b]: which text."""
    position_ids: np.ndarray
    """int64 [b]."""
    wanted: np.ndarray
    """int64 [k, 3]: (row that predicts, token, group); rows count through the shared ones and then the own ones."""
    sizes: np.ndarray
    """[frames, shared rows, visual, coarse, samples, k]."""


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
        token_budget: rows a pack and its branches are filled to; a longer request gets a pack of its own.

    Returns:
        One `Scores` a request, None where its frames could not be read, and the reasons, counted.

    Raises:
        ValueError: a score is not finite, or texts differ before their last frame (names the request).
    """
    trees = [_tree(request, presentation.grid) for request in requests]
    packs = _group(trees, token_budget)
    capacities, num_labels, has_branches = _capacities(trees, packs)
    rank, world = rank_and_world()
    found: dict[int, Scores] = {}
    lost: dict[int, str] = {}
    with evaluating(model):
        # All ranks run equally many packs: a sharded model communicates inside every forward pass.
        steps = range(0, len(packs), world)
        for first in tqdm(steps, "packs scored", leave=False, disable=True if rank else None):
            pack = packs[min(first + rank, len(packs) - 1)]
            read, unread = _read(requests, pack)
            batch = _collate(requests, trees, read, capacities, presentation)
            branches, owners = _branches(trees, list(read), num_labels, has_branches)
            call = {"mode": mode, "fine_iterations": fine_iterations}
            out = model(batch=batch.to(device), branches=branches.to(device), **call)
            found.update(_sum_groups(requests, out.logprobs.double().cpu().numpy(), owners))
            lost.update(unread)
    for other_found, other_lost in gather_over_ranks((found, lost)):
        found.update(other_found)
        lost.update(other_lost)
    return [found.get(index) for index in range(len(requests))], Counter(lost.values())


def _group(trees: Sequence[_Tree], token_budget: int) -> list[list[int]]:
    """Consecutive requests filled into packs of at most `token_budget` rows, at least one request a pack."""
    packs: list[list[int]] = []
    filled = 0
    for index, tree in enumerate(trees):
        size = tree.num_shared + len(tree.token_ids)
        if not packs or filled + size > token_budget:
            packs.append([])
            filled = 0
        packs[-1].append(index)
        filled += size
    return packs


def _tree(request: Request, grid: int) -> _Tree:
    """Where the request's texts part, and their rows behind that."""
    flat = [_flat(text, grid) for text in request.texts]
    shared = _common(flat)
    last_visual = max((int(np.flatnonzero(row < 0)[-1]) + 1 for row in flat if (row < 0).any()), default=0)
    if shared < max(1, last_visual):
        raise ValueError(f"request {request.key!r}: its texts differ before row {last_visual}, its last frame's")
    own = [row[shared:] for row in flat]
    starts = shared + np.cumsum([0, *map(len, own)])
    wanted = []
    for text, targets, start in zip(request.texts, request.targets, starts[:-1], strict=True):
        begins = np.cumsum([0, *segment_lengths(text, grid)])
        row = begins[targets[:, 0]] + targets[:, 1] - 1  # the row before it predicts
        row = np.where(row < shared, row, row - shared + start)
        wanted.append(np.stack([row, targets[:, 2], targets[:, 3]], axis=1))
    wanted = np.concatenate(wanted)
    visual = int((flat[0] < 0).sum())
    return _Tree(
        shared=_cut(request.texts[0], shared, grid),
        num_shared=shared,
        token_ids=np.concatenate(own),
        text=np.repeat(np.arange(len(own)), [len(row) for row in own]),
        position_ids=np.concatenate([np.arange(shared, shared + len(row)) for row in own]),
        wanted=wanted,
        sizes=np.array([request.num_frames, shared, visual, last_visual, 1, len(wanted)]),
    )


def _flat(text: Segments, grid: int) -> np.ndarray:
    """int64 [rows]: token ids, and −1 − frame at visual slots."""
    parts = [
        part.token_ids.astype(np.int64)
        if isinstance(part, Text)
        else np.repeat(-1 - np.array(part.frames), max(1, grid))
        for part in text
    ]
    return np.concatenate(parts)


def _common(flat: Sequence[np.ndarray]) -> int:
    """Rows that all begin with."""
    shortest = min(map(len, flat))
    same = np.all([row[:shortest] == flat[0][:shortest] for row in flat], axis=0)
    return shortest if same.all() else int(np.argmin(same))


def _cut(text: Segments, rows: int, grid: int) -> Segments:
    """The segments' first rows, without answer flags: what is scored is said by the targets."""
    parts: Segments = []
    for part, length in zip(text, segment_lengths(text, grid), strict=True):
        if rows <= 0:
            break
        if isinstance(part, Text):
            ids = part.token_ids[:rows]
            part = Text(ids, np.zeros(len(ids), np.bool_))
        parts.append(part)
        rows -= length
    return parts


def _capacities(trees: Sequence[_Tree], packs: list[list[int]]) -> tuple[Capacities, int, bool]:
    """The smallest shapes that hold every pack, so that one shape serves them all; the most labels; any branch."""
    sizes = np.array([np.sum([trees[index].sizes for index in pack], axis=0) for pack in packs]).reshape(-1, 6)
    frames, tokens, visual, coarse, samples, labels = np.maximum(1, sizes.max(axis=0, initial=1)).tolist()
    longest = max((tree.num_shared for tree in trees), default=1)
    capacities = Capacities(
        frames=frames, tokens=tokens, visual=visual, coarse=coarse, samples=samples, labels=1, max_seqlen=longest
    )
    return capacities, labels, any(len(tree.token_ids) for tree in trees)


def _read(requests: Sequence[Request], pack: list[int]) -> tuple[dict[int, np.ndarray], dict[int, str]]:
    """Frames by request, and why the others have none."""
    read, unread = {}, {}
    for index in pack:
        try:
            read[index] = requests[index].read_frames()
        except SampleError as error:
            logger.warning("%s left out: %s", requests[index].key, error)
            unread[index] = error.reason
    return read, unread


def _collate(
    requests: Sequence[Request],
    trees: Sequence[_Tree],
    read: dict[int, np.ndarray],
    capacities: Capacities,
    presentation: Presentation,
) -> PackedBatch:
    """The pack of what the texts of each request share."""
    samples = [
        LoadedSample(key=requests[index].key, segments=trees[index].shared, frames=frames, source_id=0)
        for index, frames in read.items()
    ]
    return collate(samples, capacities, "ce_answer", presentation.image_size, presentation.grid)


def _branches(
    trees: Sequence[_Tree], pack: list[int], num_labels: int, has_branches: bool
) -> tuple[Branches, np.ndarray]:
    """What the texts have of their own, and the owners int64 [k, 2] (request, group) of its first k labels.

    With `has_branches` there is at least one row, so that every rank runs the same passes.
    """
    num_rows = max(sum(len(trees[index].token_ids) for index in pack), int(has_branches))
    columns = np.zeros((4, num_rows), np.int64)  # token, position, sample, text
    columns[3] = -1
    wanted = []
    pack_row, row, text = 0, 0, 0
    for sample, index in enumerate(pack):
        tree = trees[index]
        end, shared = row + len(tree.token_ids), tree.num_shared
        columns[:, row:end] = tree.token_ids, tree.position_ids, np.full(end - row, sample), tree.text + text
        predicts = tree.wanted[:, 0]
        predicts = np.where(predicts < shared, num_rows + pack_row + predicts, row + predicts - shared)
        owner = np.full(len(predicts), index)
        wanted.append(np.stack([predicts, tree.wanted[:, 1], owner, tree.wanted[:, 2]], axis=1))
        pack_row, row, text = pack_row + shared, end, text + int(tree.text.max(initial=0)) + 1
    wanted = np.concatenate([*wanted, np.zeros((0, 4), np.int64)])
    # More labels than rows are allowed: several candidates are read off one row.
    loss_index, labels = np.zeros(num_labels, np.int64), np.full(num_labels, -100)
    loss_index[: len(wanted)], labels[: len(wanted)] = wanted[:, 0], wanted[:, 1]
    arrays = (*columns, loss_index, labels)
    names = ("token_ids", "position_ids", "sample", "text", "loss_index", "labels")
    tensors = {name: torch.from_numpy(array.copy()) for name, array in zip(names, arrays, strict=True)}
    return Branches(**tensors), wanted[:, 2:]


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
