"""Collate against a slow walk, token by token, that knows only the rules of docs/model.md."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fvlm.data.batch import LoadedSample, collate
from fvlm.data.capacities import Capacities
from fvlm.data.chat import Text, Visual

SIZE = 4
CAPACITIES = Capacities(frames=24, tokens=400, visual=300, coarse=350, samples=9, labels=200, max_seqlen=300)


def draw_samples(random, num_samples, grid=0):
    """Samples of random segments; some look at the frames of the sample before them."""
    samples = []
    for number in range(num_samples):
        frames = random.integers(0, 256, (random.integers(0, 5), 3, SIZE, SIZE), dtype=np.uint8)
        if samples and random.random() < 0.3:
            frames = samples[-1].frames
        segments = []
        for _ in range(random.integers(1, 5)):
            if len(frames) and random.random() < 0.5:
                looks = random.integers(0, len(frames), random.integers(1, 5))
                segments.append(Visual(tuple(looks.tolist())))
            segments.append(draw_text(random))
        if len(frames) and random.random() < 0.2:
            segments.append(Visual((0,)))
        samples.append(
            LoadedSample(key=str(number), segments=segments, frames=frames, source_id=int(random.integers(0, 4)))
        )
    return samples


def draw_text(random):
    n = random.integers(1, 6)
    return Text(random.integers(1, 99, n).astype(np.int32), random.random(n) < 0.5)


def walk(samples, capacities, objective, grid):
    """Every field of the batch as plain lists, one token at a time."""
    F, T, V, C = capacities.frames, capacities.tokens, capacities.visual, capacities.coarse
    frames, frames_of = [], []
    token_ids, positions, bounds, coarse_bounds = [], [], [0], [0]
    coarse, losses, visuals = [], [], []
    for sample in samples:
        known = [start for seen, start in frames_of if seen is sample.frames]
        if known:
            first = known[0]
        else:
            first = len(frames)
            frames_of.append((sample.frames, first))
            frames.extend(sample.frames)
        tokens = []  # (token, frame or None, cell, is a label)
        has_text = False
        for part in sample.segments:
            if isinstance(part, Visual):
                for frame in part.frames:
                    for cell in range(max(grid, 1)):
                        tokens.append((0, first + frame, cell, False))
            else:
                for token, is_answer in zip(part.token_ids.tolist(), part.is_answer.tolist(), strict=True):
                    tokens.append((token, None, None, has_text and (is_answer or objective == "ce_all")))
                    has_text = True
        last_visual = max((i for i, token in enumerate(tokens) if token[1] is not None), default=-1)
        start = len(token_ids)
        for position, (token, frame, cell, is_label) in enumerate(tokens):
            row = start + position
            if frame is not None:
                visuals.append((frame, row, len(coarse) - 1 if position else -1, cell))
            if position <= last_visual:
                coarse.append(row)
            if is_label:
                losses.append((row - 1, token))
            token_ids.append(token)
            positions.append(position)
        bounds.append(len(token_ids))
        coarse_bounds.append(len(coarse))
    free = V - len(visuals)
    visuals += [(i * F // free, T, -1, 0) for i in range(free)]  # unused ones are spread over the frames
    visuals.sort()
    return {
        "frames": frames + [np.zeros((3, SIZE, SIZE), np.uint8)] * (F - len(frames)),
        "token_ids": fill(token_ids, T, 0),
        "position_ids": fill(positions, T, 0),
        "cu_seqlens": fill(bounds, capacities.samples + 1, bounds[-1]),
        "loss_index": fill([row for row, _ in losses], capacities.labels, 0),
        "labels": fill([label for _, label in losses], capacities.labels, -100),
        "visual_index": [v[1] for v in visuals],
        "visual_frame": [v[0] for v in visuals],
        "query_from": [v[2] for v in visuals],
        "coarse_index": fill(coarse, C, T),
        "coarse_cu_seqlens": fill(coarse_bounds, capacities.samples + 1, coarse_bounds[-1]),
        "source_id": fill([sample.source_id for sample in samples], capacities.samples, -1),
        "visual_cell": [v[3] for v in visuals] if grid else None,
    }


def fill(values, size, unused):
    return values + [unused] * (size - len(values))


def used(batch, name):
    """The entries of a visual tensor that belong to a sample."""
    return getattr(batch, name)[batch.visual_index < len(batch.token_ids)].tolist()


@given(
    seed=st.integers(0, 2**32 - 1),
    num_samples=st.integers(0, 6),
    objective=st.sampled_from(["ce_all", "ce_answer"]),
    grid=st.sampled_from([0, 1, 4]),
)
@settings(max_examples=150, deadline=None)
def test_collate_equals_a_slow_walk(seed, num_samples, objective, grid):
    samples = draw_samples(np.random.default_rng(seed), num_samples)
    batch = collate(samples, CAPACITIES, objective, SIZE, grid)
    batch.validate()
    expected = walk(samples, CAPACITIES, objective, grid)
    for name, values in expected.items():
        found = getattr(batch, name)
        if values is None:
            assert found is None
        elif name == "frames":
            assert found.dtype == torch.uint8
            np.testing.assert_array_equal(found.numpy(), np.stack(values))
        else:
            assert found.dtype == (torch.int32 if name.endswith("seqlens") else torch.int64)
            assert found.tolist() == values, name
    assert batch.max_seqlen == CAPACITIES.max_seqlen


def sample_of(segments, num_frames=1, frames=None):
    frames = np.full((num_frames, 3, SIZE, SIZE), 7, np.uint8) if frames is None else frames
    return LoadedSample(key="k", segments=segments, frames=frames, source_id=0)


def text(*ids):
    return Text(np.array(ids, np.int32), np.ones(len(ids), bool))


def test_video_first_by_hand():
    """The published layout: q_init writes the first look, and the position before writes every other one."""
    batch = collate([sample_of([text(5)]), sample_of([Visual((0, 1)), text(1, 8, 9)], 2)], CAPACITIES, "ce_all", SIZE)
    assert batch.cu_seqlens[:3].tolist() == [0, 1, 6]
    assert batch.coarse_cu_seqlens[:3].tolist() == [0, 0, 2]
    assert batch.coarse_index[:3].tolist() == [1, 2, CAPACITIES.tokens]
    assert used(batch, "query_from") == [-1, 0]
    assert used(batch, "visual_frame") == [1, 2]
    assert batch.labels[:3].tolist() == [8, 9, -100]  # not the start token
    assert batch.loss_index[:2].tolist() == [3, 4]


def test_question_first_by_hand():
    """The question's last token writes the first look; the label after a visual slot counts."""
    batch = collate([sample_of([text(1, 4), Visual((0, 0)), text(6)])], CAPACITIES, "ce_all", SIZE)
    assert batch.coarse_index[:5].tolist() == [0, 1, 2, 3, CAPACITIES.tokens]
    assert used(batch, "query_from") == [1, 2]
    assert used(batch, "visual_frame") == [0, 0]
    assert (batch.labels[:2].tolist(), batch.loss_index[:2].tolist()) == ([4, 6], [0, 3])


def test_samples_share_frames_by_identity_only():
    frames = np.full((2, 3, SIZE, SIZE), 9, np.uint8)
    parts = [Visual((0, 1)), text(1, 2)]
    shared = collate([sample_of(parts, frames=frames) for _ in range(3)], CAPACITIES, "ce_all", SIZE)
    assert used(shared, "visual_frame") == [0, 0, 0, 1, 1, 1]
    assert used(shared, "visual_index") == [0, 4, 8, 1, 5, 9]
    assert int(shared.frames.sum(dtype=torch.int64)) == int(frames.sum())
    copies = collate([sample_of(parts, frames=frames.copy()) for _ in range(3)], CAPACITIES, "ce_all", SIZE)
    assert used(copies, "visual_frame") == [0, 1, 2, 3, 4, 5]


def test_empty_pack_keeps_every_shape():
    empty = collate([], CAPACITIES, "ce_all", SIZE, grid=4)
    full = collate([sample_of([Visual((0,)), text(1, 2)])], CAPACITIES, "ce_all", SIZE, grid=4)
    empty.validate()
    for name in ("frames", "token_ids", "labels", "visual_index", "coarse_index", "source_id", "visual_cell"):
        assert getattr(empty, name).shape == getattr(full, name).shape
    assert (empty.labels == -100).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 9}, "T = 11 > 9"),
        ({"visual": 1}, "V = 4 > 1"),
        ({"labels": 2}, "K = 5 > 2"),
        ({"samples": 1}, "S = 2 > 1"),
        ({"coarse": 3}, "C = 4 > 3"),
        ({"frames": 1}, "capacities.frames = 1"),
    ],
)
def test_over_capacity_is_named(change, message):
    small = {"visual": 4, "coarse": 9, "labels": 9, "max_seqlen": 9} if "tokens" in change else {}
    samples = [sample_of([Visual((0, 0)), text(1, 2, 3)]), sample_of([Visual((0, 0)), text(1, 2, 3, 4)])]
    with pytest.raises(ValueError, match=message):
        collate(samples, replace(CAPACITIES, **small | change), "ce_all", SIZE)


def test_wrong_frame_size_and_objective_are_named():
    with pytest.raises(ValueError, match="image size"):
        collate([sample_of([text(1)], frames=np.zeros((1, 3, 8, 8), np.uint8))], CAPACITIES, "ce_all", SIZE)
    with pytest.raises(ValueError, match="objective"):
        collate([], CAPACITIES, "mse", SIZE)
