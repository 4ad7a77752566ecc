"""Combinations of colour, shape and place, and which of them training never shows.

One combination in ten is held out: no clip of the training split shows it, and a validation clip asks about at least
one. A model that has learned to look answers those as well as the others; one that has learned combinations by heart
does not.
"""

from __future__ import annotations

import random
import zlib
from typing import NamedTuple

from data_prep.synthetic.draw import COLOURS, GRID, SHAPES, Scene, Thing

COLOUR_NAMES = tuple(COLOURS)
CELLS = tuple(range(GRID * GRID))
GREYS = ((26, 26, 26), (52, 52, 52), (78, 78, 78))


class Combination(NamedTuple):
    """What stands where; `cell` is the row-major number of the grid cell."""

    colour: str
    shape: str
    cell: int


def _is_rare(combination: Combination) -> bool:
    return zlib.crc32("{} {} {}".format(*combination).encode()) % 10 == 0


HELD_OUT = frozenset(
    each for c in COLOUR_NAMES for s in SHAPES for cell in CELLS if _is_rare(each := Combination(c, s, cell))
)
"""Combinations that training never shows."""


def place(cell: int) -> list[int]:
    """[row, column] of a cell, counted from 0."""
    return list(divmod(cell, GRID))


class Dealer(random.Random):
    """A seeded source of combinations that a split may show.

    `split` is "train" or "val". `jitter` is how far, in cells, a glyph may sit off the centre of its cell; it also
    drifts by twice that a second.
    """

    def __init__(self, seed: str, split: str, jitter: float = 0.0):
        super().__init__(seed)
        self.trains, self.jitter = split == "train", jitter

    def allows(self, combination: Combination) -> bool:
        """Whether the split may show the combination."""
        return not self.trains or combination not in HELD_OUT

    def combination(self, *, rare: bool = False, **fixed) -> Combination | None:
        """A random combination with the given parts fixed; `rare` asks for a held-out one. None if there seems none."""
        for _ in range(400):
            drawn = {"colour": self.choice(COLOUR_NAMES), "shape": self.choice(SHAPES), "cell": self.choice(CELLS)}
            each = Combination(**drawn | fixed)
            if each in HELD_OUT if rare else self.allows(each):
                return each
        return None

    def crowd(self, target: Combination, count: int, unique: str) -> list[Combination]:
        """`target` among `count` combinations at distinct places, no other sharing its `unique` attribute.

        Up to eight of them all differ in that attribute ("colour" or "shape"); with "cell" they differ in colour.
        """
        attribute = "colour" if unique == "cell" else unique
        names = COLOUR_NAMES if attribute == "colour" else SHAPES
        others = [name for name in names if name != getattr(target, attribute)]
        self.shuffle(others)
        cells = [cell for cell in CELLS if cell != target.cell]
        self.shuffle(cells)
        return [
            target,
            *(self.combination(cell=cells[i], **{attribute: others[i % len(others)]}) for i in range(count - 1)),
        ]

    def thing(self, combination: Combination) -> Thing:
        """The glyph of a combination, off its centre and drifting as far as the jitter says."""
        row, column = place(combination.cell)
        if not self.jitter:
            return Thing(combination.shape, combination.colour, row, column)
        down, right, drift_down, drift_right = (self.uniform(-self.jitter, self.jitter) for _ in range(4))
        drift = (2 * drift_down, 2 * drift_right)
        return Thing(combination.shape, combination.colour, row + down, column + right, before=drift, after=drift)

    def scene(self, combinations: list[Combination], background: tuple[int, int, int]) -> Scene:
        """One second that shows the combinations."""
        return Scene(tuple(self.thing(each) for each in combinations), background)
