"""The ablation matrix: questions to be answered by yes or no, the arms that answer them, and the rule that judges."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from fvlm.config import CONFIGS
from fvlm.model.configuration import MODES
from fvlm.schema import build, read_mapping, require, resolve

METRIC = re.compile(rf"val_loss|(accuracy|mc)(_({'|'.join(MODES)}))?|(mc|slots|loss):\S+")
Needs = Literal["real data", "drawn clips", "random weights"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """When one arm is better than another: their difference, with its whole interval, is more than `margin`."""

    metric: str
    """val_loss, accuracy (of lists, or where there are none of multiple choice), mc (all multiple choice), both in the
    trained mode; accuracy_MODE, mc_MODE; of one source mc:SOURCE, slots:SOURCE, loss:SOURCE."""
    better: Literal["lower", "higher"]
    margin: float = 0.0
    """Share or nats."""

    def __post_init__(self) -> None:
        expected = f"val_loss, accuracy[_MODE], mc[_MODE] ({', '.join(MODES)}), or mc:, slots: or loss: and a source"
        require(METRIC.fullmatch(self.metric) is not None, "judge.metric", self.metric, expected)


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One change to the base."""

    set: tuple[str, ...] = ()
    """key=value."""
    scale: dict[str, float] = field(default_factory=dict)
    """Key of a number in the base → factor."""
    after: str | None = None
    """The entry of `starts` whose weights it starts from."""
    seeds: tuple[int, ...] = ()
    """Instead of the matrix's."""
    evaluate: tuple[str, ...] = ()
    """Further arguments of launch/evaluate.py."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """A run that arms start from, one for each of their seeds; not judged itself."""

    set: tuple[str, ...] = ()
    scale: dict[str, float] = field(default_factory=dict)
    needs: Needs | None = None
    """Where the base lacks it, the arms start from the base's own weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Is `of` better than `against`?"""

    of: str
    against: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A question in plain words that is answered by yes or no."""

    asks: str
    """In plain words."""
    arms: dict[str, Arm | tuple[str, ...]] = field(default_factory=dict)
    """By name; a list is what is `set`."""
    compare: tuple[Comparison, ...] = ()
    """Yes if any `of` is better; none: each arm against the reference."""
    judge: tuple[Rule, ...] = ()
    """Instead of the matrix's."""
    needs: Needs | None = None
    """Where the base lacks it, the arms are left out."""
    if_yes: str
    """What follows."""
    if_no: str
    if_open: str
    """Where the runs do not settle it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Matrix:
    """`launch/configs/studies/ablations.yaml`."""

    reference: str
    """Name of the arm without a change."""
    judge: tuple[Rule, ...]
    """The first rule whose metric both arms have on record decides."""
    seeds: tuple[int, ...] = (0,)
    starts: dict[str, Start] = field(default_factory=dict)
    questions: dict[str, Question]

    def __post_init__(self) -> None:
        require(bool(self.seeds), "seeds", self.seeds, "at least one number")
        require(bool(self.judge), "judge", self.judge, "at least one rule")
        arms = self.arms
        for name, question in self.questions.items():
            for arm in question.arms:
                where = f"questions.{name}.arms.{arm}"
                fits = bool(re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", arm))
                require(fits, where, arm, "a name of letters, digits and _, beginning with a letter")
                times = [arm in other.arms for other in self.questions.values()].count(True)
                taken = times > 1 or arm in {self.reference, *self.starts}
                require(not taken, where, arm, "a name that nothing else has")
                start = arms[arm].after
                require(start is None or start in self.starts, f"{where}.after", start, f"one of {list(self.starts)}")
            for number, pair in enumerate(question.compare):
                for side in (pair.of, pair.against):
                    known = side in arms
                    require(known, f"questions.{name}.compare[{number}]", side, f"one of the arms {', '.join(arms)}")

    @property
    def arms(self) -> dict[str, Arm]:
        """All of them by name, the reference first."""
        named = {name: arm for question in self.questions.values() for name, arm in question.arms.items()}
        arms = {name: arm if isinstance(arm, Arm) else Arm(set=tuple(arm)) for name, arm in named.items()}
        return {self.reference: Arm(), **arms}

    def comparisons(self, question: str) -> list[Comparison]:
        """Of a question."""
        asked = self.questions[question]
        return list(asked.compare) or [Comparison(of=arm, against=self.reference) for arm in asked.arms]

    def rules(self, question: str) -> tuple[Rule, ...]:
        """Of a question, the first one first."""
        return self.questions[question].judge or self.judge


def load_matrix(name: str) -> Matrix:
    """A matrix: a YAML file, or a name in launch/configs; raises ConfigError naming the key and what was expected."""
    return build(Matrix, read_mapping(resolve(name, CONFIGS / "studies", ".yaml")))
