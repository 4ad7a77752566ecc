"""Fit samples into packs of fixed capacities: a pure function of costs and capacities."""

from __future__ import annotations

import math

import numpy as np

MAIN = 2  # the first two dimensions, frames and tokens, are what packs are filled to
_EVENNESS = 0.3  # weight of the other dimensions, which are kept even so that their capacities can be tight


def pack_samples(costs: np.ndarray, capacity: np.ndarray) -> list[np.ndarray]:
    """Group samples so that no group exceeds the capacity, in nearly as few groups as the sums allow.

    Best fit, largest first, with all packs that the sums call for open from the start: a sample goes where what is
    missing to an even share of the whole points most in the sample's own direction. So packs become alike in every
    dimension, and small samples level them at the end. What fits nowhere is packed again by itself.

    `costs` int64 [n, D], `capacity` int64 [D], each sample within it alone. Returns index arrays, ascending in each.
    """
    groups: list[np.ndarray] = []
    todo = np.arange(len(costs))
    while len(todo):
        members, todo = _fill(costs, capacity, todo)
        groups += [np.sort(group) for group in members if len(group)]
    return groups


def _fill(costs: np.ndarray, capacity: np.ndarray, todo: np.ndarray) -> tuple[list[list[int]], np.ndarray]:
    """One round over `todo`: the groups filled, and what found no place."""
    total = costs[todo].sum(axis=0)
    num_packs = int(np.max(-(-total // capacity)))
    shares = costs / np.maximum(total / num_packs, 1)
    largest_first = todo[np.argsort(-shares[todo, :MAIN].max(axis=1), kind="stable")]
    weight = np.where(np.arange(len(capacity)) < MAIN, 1.0, _EVENNESS)
    shares = (shares * weight)[:, :, None]
    room = np.repeat(capacity[:, None], num_packs, axis=1)
    missing = np.repeat(weight[:, None], num_packs, axis=1)  # [D, packs], below 0 over an even share
    length = np.sqrt((missing * missing).sum(axis=0))
    aligned, alignment = np.empty_like(missing), np.empty_like(length)
    members: list[list[int]] = [[] for _ in range(num_packs)]
    left_over = []
    for i in largest_first.tolist():
        cost = costs[i]
        np.multiply(missing, shares[i], out=aligned)
        np.add.reduce(aligned, axis=0, out=alignment)  # not a BLAS product: the same on every machine
        np.divide(alignment, length, out=alignment)
        best = int(alignment.argmax())
        if (room[:, best] < cost).any():  # seldom, until packs are nearly full: only now look at the room of all
            alignment[(room < cost[:, None]).any(axis=0)] = -np.inf
            best = int(alignment.argmax())
            if alignment[best] == -np.inf:
                left_over.append(i)
                continue
        members[best].append(i)
        room[:, best] -= cost
        column = missing[:, best]
        column -= shares[i, :, 0]
        length[best] = max(math.sqrt((column * column).sum()), 1e-9)
    return members, np.sort(np.array(left_over, dtype=np.int64))
