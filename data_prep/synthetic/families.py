"""The families of the synthetic corpus: what each clip shows and what is asked about it.

A family is a function (dealer, level) -> Draft. In most of them something seen or said earlier tells where to look, so
that a summary of a frame made without knowing it cannot hold the answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from data_prep.synthetic.combinations import CELLS, COLOUR_NAMES, GREYS, Combination, Dealer, place
from data_prep.synthetic.draw import ARROWS, BACKGROUNDS, GRID, SHAPES, Scene, Thing
from data_prep.synthetic.questions import (
    CAPTION,
    NUMBERS,
    OPPOSITES,
    QUESTIONS,
    RELATIONS,
    Draft,
    choice_row,
    row,
    says,
)

SPARSE = (2, 3, 5)
"""Glyphs in a scene of easier training clips of the cue families: there a rough look already pays, which shortens the
plateau before looking is learned. Validation clips are never sparse."""
MULTIPLE_CHOICE_SHARE = 0.25  # of the training clips of the cue families; in validation every clip has such a row


@dataclass(frozen=True, slots=True)
class Level:
    """How hard a clip is."""

    frames: int
    """Scenes in a clip, one a second."""
    glyphs: int
    """Glyphs in a scene, the one asked about included."""
    lookalikes: int
    """Equal objects in a tracking clip, the marked one included."""
    jitter: float
    """How far glyphs stray from the centre of their cell, in cells."""


LEVELS = {1: Level(6, 8, 3, 0.0), 2: Level(8, 10, 4, 0.06), 3: Level(12, 12, 5, 0.12)}


def cue(dealer: Dealer, level: Level) -> Draft:
    """A coloured square, then crowds with one glyph of its colour: which shape is that, frame by frame?"""
    first = dealer.combination(shape="square")
    return _follow(dealer, level, "cue", first, cued="colour", asked="shape")


def cue_shape(dealer: Dealer, level: Level) -> Draft:
    """A white glyph, then crowds with one glyph of its shape: which colour is that, frame by frame?"""
    first = dealer.combination(colour="white")
    return _follow(dealer, level, "cue_shape", first, cued="shape", asked="colour")


def cue_place(dealer: Dealer, level: Level) -> Draft:
    """A white square, then crowds with a glyph in its place: which shape is that, frame by frame?"""
    first = dealer.combination(colour="white", shape="square")
    return _follow(dealer, level, "cue_place", first, cued="cell", asked="shape")


def _follow(dealer: Dealer, level: Level, kind: str, first: Combination, *, cued: str, asked: str) -> Draft:
    """Crowds in which one glyph has the `cued` attribute of `first`, which the first scene shows, or else the question
    tells; a row for what is `asked` of all of these glyphs, and perhaps one for that of a single one."""
    begin, wording = (0, f"ask_{cued}") if kind == "ask" else (1, kind)
    background = dealer.choice(GREYS)
    rare_frame = None if dealer.trains else dealer.randrange(begin, level.frames)
    glyphs = dealer.choice((*SPARSE, level.glyphs)) if dealer.trains else level.glyphs
    targets = [first][:begin]
    scenes = [dealer.scene([target], background) for target in targets]
    for number in range(begin, level.frames):
        target = dealer.combination(rare=number == rare_frame, **{cued: getattr(first, cued)})
        scenes.append(dealer.scene(dealer.crowd(target, glyphs, unique=cued), background))
        targets.append(target)
    answers = [getattr(target, asked) for target in targets[begin:]]
    look_at = [place(target.cell) for target in targets]
    narration = [""] * begin + [f" {answer}" for answer in answers]
    told = {"colour": first.colour, "place": says(place(first.cell))}
    rare, stream = not dealer.trains, begin > 0
    asks = QUESTIONS[wording].format(**told)
    rows = [row(kind, asks, " ".join(answers), look_at, narration, rare=rare, stream=stream)]
    if not dealer.trains or dealer.random() < MULTIPLE_CHOICE_SHARE:
        number = dealer.randrange(begin, level.frames)
        user = QUESTIONS[f"{wording}_mc"].format(**told, picture=number + 1)
        options = SHAPES if asked == "shape" else COLOUR_NAMES
        rare = number == rare_frame
        rows.append(choice_row(f"{kind}_mc", user, options, answers[number - begin], look_at=look_at, rare=rare))
    return Draft("video", tuple(scenes), rows)


def preference(dealer: Dealer, level: Level) -> Draft:
    """A cue clip with two lists to choose from: the right one, and one with other shapes for some frames."""
    made = cue(dealer, level)
    told, right = made.rows[0], made.rows[0]["assistant"].split()
    wrong = set(dealer.sample(range(len(right)), dealer.randrange(1, len(right) + 1)))
    said = [dealer.choice([s for s in SHAPES if s != word]) if i in wrong else word for i, word in enumerate(right)]
    kept = {name: told[name] for name in ("user", "look_at", "tags") if name in told}
    pair = {"source": "synthetic/preference", **kept, "chosen": told["assistant"], "rejected": " ".join(said)}
    return Draft("video", made.scenes, [pair])


def relay(dealer: Dealer, level: Level) -> Draft:
    """The arrow at the current place points to the next one, among arrows that do not matter: where does it end?"""
    background, cell = dealer.choice(GREYS), dealer.choice(CELLS)
    scenes, path, narration = [], [], []
    for number in range(level.frames - 1):
        others = dealer.sample([c for c in CELLS if c != cell], level.glyphs - 1) if number else []
        arrows = [Combination(dealer.choice(COLOUR_NAMES), dealer.choice(_ways(c)), c) for c in (cell, *others)]
        scenes.append(dealer.scene(arrows, background))
        path.append(place(cell))
        narration.append(f" {arrows[0].shape}")
        down, right = ARROWS[arrows[0].shape]
        cell += down * GRID + right
    rare = not dealer.trains
    end = dealer.combination(rare=rare, cell=cell)
    scenes.append(dealer.scene(dealer.crowd(end, level.glyphs, unique="colour"), background))
    more = {"look_at": [*path, place(cell)], "narration": [*narration, f" {end.shape}"], "rare": rare}
    return Draft("video", tuple(scenes), [choice_row("relay", QUESTIONS["relay"], SHAPES, end.shape, **more)])


def _ways(cell: int) -> list[str]:
    """The arrows that stay on the grid."""
    at_row, column = place(cell)
    return [way for way, (d, r) in ARROWS.items() if 0 <= at_row + d < GRID and 0 <= column + r < GRID]


def tracking(dealer: Dealer, level: Level) -> Draft:
    """Look-alikes walk over the grid, one of them marked in frame 1; at the end all change shape. Which, where?

    A frame a second suffices: of the cells that the marked one can reach in a step, only its own next cell is taken.
    """
    draft = None
    while draft is None:  # a walk into a dead end, or without a held-out combination for its end, is drawn anew
        draft = _tracking(dealer, level)
    return draft


def _tracking(dealer: Dealer, level: Level) -> Draft | None:
    mark, colour = dealer.sample(COLOUR_NAMES, 2)
    shape = dealer.choice(SHAPES)
    walk = [dealer.sample(CELLS, level.lookalikes)]
    while len(walk) < level.frames:
        step = next((s for s in (_step(dealer, walk[-1]) for _ in range(50)) if s), None)
        if step is None:
            return None
        walk.append(step)
    shown = [[Combination(mark if not (i or number) else colour, shape, c) for i, c in enumerate(cells)]
             for number, cells in enumerate(walk[:-1])]  # fmt: skip
    target = dealer.combination(rare=not dealer.trains, colour=colour, cell=walk[-1][0])
    if target is None:
        return None
    rest = dealer.sample([s for s in SHAPES if s != target.shape], level.lookalikes - 1)
    shown.append([target, *(Combination(colour, s, c) for s, c in zip(rest, walk[-1][1:], strict=True))])
    if not all(dealer.allows(each) for scene in shown for each in scene):
        return None
    return Draft("video", _moving(dealer.choice(GREYS), shown), [_tracking_row(dealer, mark, shown)])


def _step(dealer: Dealer, cells: list[int]) -> list[int] | None:
    """One step of every object to a neighbouring cell; None if the first could be mistaken or two would meet."""
    after = [dealer.choice(_reach(cell)[1:] if dealer.random() < 0.8 else [cell]) for cell in cells]
    met = len(set(after)) < len(after)
    return None if met or set(_reach(cells[0])) & set(after[1:]) else after


def _reach(cell: int) -> list[int]:
    """The cell itself and its neighbours."""
    return [cell, *(cell + ARROWS[way][0] * GRID + ARROWS[way][1] for way in _ways(cell))]


def _moving(background: tuple[int, int, int], shown: list[list[Combination]]) -> tuple[Scene, ...]:
    """Scenes in which each object travels to its place in the next scene."""
    places = [[place(each.cell) for each in scene] for scene in shown]
    scenes = []
    for number, scene in enumerate(shown):
        before, here, after = (places[min(max(n, 0), len(shown) - 1)] for n in (number - 1, number, number + 1))
        things = [
            Thing(each.shape, each.colour, *h, before=(h[0] - b[0], h[1] - b[1]), after=(a[0] - h[0], a[1] - h[1]))
            for each, b, h, a in zip(scene, before, here, after, strict=True)
        ]
        scenes.append(Scene(tuple(things), background))
    return tuple(scenes)


def _tracking_row(dealer: Dealer, mark: str, shown: list[list[Combination]]) -> dict:
    path, end = [place(scene[0].cell) for scene in shown], shown[-1]
    narration = [f" {says(each)}" for each in path]
    narration[-1] += f" {end[0].shape}"
    more = {"look_at": path, "narration": narration, "rare": not dealer.trains}
    if dealer.random() < 0.5:
        return choice_row("tracking", QUESTIONS["tracking_shape"].format(colour=mark), SHAPES, end[0].shape, **more)
    options = [says(place(each.cell)) for each in sorted(end, key=lambda each: each.cell)]
    return choice_row("tracking", QUESTIONS["tracking_place"].format(colour=mark), options, says(path[-1]), **more)


def ask(dealer: Dealer, level: Level) -> Draft:
    """Crowds without a cue: only the words of the question say which colour, or which place, matters."""
    return _follow(dealer, level, "ask", dealer.combination(), cued=dealer.choice(("colour", "cell")), asked="shape")


def still(dealer: Dealer, level: Level) -> Draft:
    """One picture of a crowd, and a question about a colour or a place."""
    return _asked(dealer, level, "still", "still_{}", 1)


def images(dealer: Dealer, level: Level) -> Draft:
    """Two to four pictures of crowds, and a question about one of them."""
    return _asked(dealer, level, "images", "ask_{}_mc", dealer.randrange(2, 5))


def _asked(dealer: Dealer, level: Level, source: str, wording: str, count: int) -> Draft:
    background, number, rare = dealer.choice(GREYS), dealer.randrange(count), not dealer.trains
    targets = [dealer.combination(rare=rare and i == number) for i in range(count)]
    scenes = [dealer.scene(dealer.crowd(each, level.glyphs, unique="colour"), background) for each in targets]
    target = targets[number]
    question = QUESTIONS[wording.format(dealer.choice(("colour", "cell")))]
    user = question.format(colour=target.colour, place=says(place(target.cell)), picture=number + 1)
    look_at = [place(target.cell) if i == number else None for i in range(count)]
    made = choice_row(source, user, SHAPES, target.shape, look_at=look_at, rare=rare)
    return Draft("image" if count == 1 else "images", tuple(scenes), [made])


def caption(dealer: Dealer, level: Level) -> Draft:
    """Two big objects on a coloured background throughout: content that a fixed summary of a frame can hold."""
    background, relation = dealer.choice(tuple(BACKGROUNDS)), dealer.choice(tuple(RELATIONS))
    (down, right), (colour, other_colour) = RELATIONS[relation], dealer.sample(COLOUR_NAMES, 2)
    shape, other_shape, free = dealer.choice(SHAPES), dealer.choice(SHAPES), dealer.randrange(GRID - 1)
    at_row, column = (0, free) if down else (free, 0)
    first = Thing(shape, colour, at_row, column, span=2)
    second = Thing(other_shape, other_colour, at_row + down, column + right, span=2)
    words = {"colour": colour, "shape": shape, "other_colour": other_colour, "other_shape": other_shape}
    sentence = CAPTION.format(**words, relation=relation, background=background)
    scene = Scene((first, second), BACKGROUNDS[background])
    return Draft("video", (scene,) * level.frames, [row("caption", QUESTIONS["caption"], sentence)])


def text(dealer: Dealer, level: Level) -> Draft:
    """A short question about words and numbers, without a picture."""
    words = dealer.sample((*COLOUR_NAMES, *SHAPES), dealer.randrange(2, 5))
    number, other = dealer.randrange(6), dealer.randrange(5)
    end, opposite = dealer.sample(dealer.choice(OPPOSITES), 2)
    kind, word, answer = dealer.choice(
        [
            ("text_after", "", NUMBERS[number + 1]),
            ("text_plus", "", NUMBERS[number + other]),
            ("text_other", end, opposite),
            ("text_kind", words[0], "a colour" if words[0] in COLOUR_NAMES else "a shape"),
            ("text_last", "", words[-1]),
            ("text_repeat", "", " ".join(words)),
        ]
    )
    fields = {"number": NUMBERS[number], "other": NUMBERS[other], "word": word, "words": " ".join(words)}
    return Draft("text", (), [row("text", QUESTIONS[kind].format(**fields), answer)])


FAMILIES: dict[str, Callable[[Dealer, Level], Draft]] = {
    each.__name__: each
    for each in (cue, cue_shape, cue_place, preference, tracking, relay, ask, caption, still, images, text)
}
"""Every family by name. Its rows have source "synthetic/<name>", multiple choice of the cue families "<name>_mc"."""
