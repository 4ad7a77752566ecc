"""Which samples a run draws how often, and how they are laid out: what `data.mixture` of a run states.

Shares follow from it in `fvlm.data.shares`, the order of samples in `fvlm.data.order`; docs/data.md has the rules.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

from fvlm.schema import ConfigError, read_mapping, resolve

GRIDS = (0, 1, 4, 16)
Kind = Literal["video", "image", "images", "text"]
"""`fvlm.data.shard.KINDS`, as keys of `MixtureConfig.kinds`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MixtureConfig:
    """Shares, limits and layouts, as a run's YAML or a file in `launch/configs/mixtures` states them.

    Raises ValueError naming key, value and what was expected.
    """

    weights: dict[str, float] | None = None
    """Relative weight of each source; null: by size, so that without limits an epoch shows each sample once."""
    text_share: float | None = None
    """Share of text-only samples, spread evenly; null: as the weights give it."""
    kinds: dict[Kind, float] | None = None
    """Relative share of each kind of sample, the sources within a kind by their weights; instead of `text_share`."""
    caps: dict[str, float] | None = None
    """Source → the most it contributes: below 1 a share of the samples drawn, from 1 on a number of samples."""
    repeats: dict[str, int] | None = None
    """Source → how often each of its samples is shown at most."""
    tag_caps: dict[str, float] | None = None
    """Tag → largest share of the samples drawn that carry it."""
    missing: Literal["error", "skip"] = "error"
    """What sources and kinds become that are named here and not in the data: `skip` gives their share to the others."""
    question_first: float = 0.0
    """Share of the samples with frames whose frames follow the first question."""
    narrated: float = 0.0
    """Share of the samples with a narration that are laid out with it."""
    looks: int = 8
    """Visual tokens of a still."""

    def __post_init__(self) -> None:
        for name in ("text_share", "question_first", "narrated"):
            value = getattr(self, name)
            _require(value is None or 0 <= value <= 1, name, value, "a share between 0 and 1")
        _require(self.looks >= 1, "looks", self.looks, "at least 1")
        for name in ("weights", "kinds"):
            shares = getattr(self, name)
            for key, value in (shares or {}).items():
                _require(0 <= value < float("inf"), f"{name}.{key}", value, "a number of at least 0")
            _require(shares is None or any(shares.values()), name, shares, "one above 0; all are 0")
        alone = self.kinds is None or self.text_share is None
        _require(alone, "text_share", self.text_share, "null beside kinds, where kinds.text is the share of text")
        for source, value in (self.caps or {}).items():
            fits = 0 < value < 1 or (value >= 1 and float(value).is_integer())
            _require(fits, f"caps.{source}", value, "a share between 0 and 1, or a whole number of samples")
        for source, value in (self.repeats or {}).items():
            _require(value >= 1, f"repeats.{source}", value, "at least 1 (a weight of 0 leaves a source out)")
        for tag, value in (self.tag_caps or {}).items():
            _require(0 <= value <= 1, f"tag_caps.{tag}", value, "a share between 0 and 1")
        _require(self.missing in ("error", "skip"), "missing", self.missing, "error or skip")

    def fitted(self, present: Collection[tuple[str, str]]) -> tuple[Self, list[str]]:
        """The mixture as far as the data go, and a line for each thing left out.

        `present`: the pairs (source, kind) of the samples there are. Raises ValueError for what is named and not there,
        unless `missing` is `skip`, and for a source or kind that is there and has no share where others have one.
        """
        notes: list[str] = []
        sources = {source for source, _ in present}
        weights = self._complete("weights", self.weights, sources, notes)
        drawn = {source for source in sources if weights is None or weights[source]}
        kinds_there = {kind for source, kind in present if source in drawn}
        left_out = {source for source, weight in (self.weights or {}).items() if not weight}
        changes = {
            "weights": weights,
            "kinds": self._complete("kinds", self.kinds, kinds_there, notes),
            "text_share": self._text_share(kinds_there, notes),
            "caps": self._known("caps", self.caps, sources | left_out, notes),
            "repeats": self._known("repeats", self.repeats, sources | left_out, notes),
        }
        return replace(self, **changes), notes

    def _complete(self, name: str, shares: Mapping | None, there: set[str], notes: list[str]) -> dict | None:
        """Shares of what is there, by name exactly."""
        if shares is None:
            return None
        if unnamed := sorted(there - set(shares)):
            unknown = f"; no sample of {', '.join(lost)}" if (lost := sorted(set(shares) - there)) else ""
            raise ValueError(
                f"mixture.{name}: nothing for {', '.join(unnamed)}, which the data hold{unknown}; name exactly the "
                f"{'sources' if name == 'weights' else 'kinds'} present (0 leaves one out)"
            )
        self._known(name, {key: share for key, share in shares.items() if share}, there, notes)
        return {key: share for key, share in shares.items() if key in there}

    def _known(self, name: str, values: Mapping | None, there: set[str], notes: list[str]) -> dict | None:
        """Values of what is there; a note, or an error, for the rest."""
        absent = sorted(set(values or ()) - there)
        if absent and self.missing == "error":
            raise ValueError(
                f"mixture.{name}: the data hold no sample of {', '.join(absent)}, only of {', '.join(sorted(there))}; "
                f"add it to the data, take it out of the mixture, or set missing: skip to go on with what is there"
            )
        if absent:
            notes.append(f"{name}: no sample of {', '.join(absent)} in the data; the others take the place")
        return None if values is None else {key: value for key, value in values.items() if key in there}

    def _text_share(self, kinds: set[str], notes: list[str]) -> float | None:
        for what, found, only in (("text-only", "text" in kinds, 0.0), ("visual", kinds - {"text"}, 1.0)):
            if self.text_share in (None, only) or found:
                continue
            message = f"text_share = {self.text_share}: no source with a weight holds {what} samples"
            if self.missing == "error":
                raise ValueError(f"mixture.{message}; add some, set it to {only:g} or null, or set missing: skip")
            notes.append(f"{message}; taken as {only:g}")
            return only
        return self.text_share


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixture(MixtureConfig):
    """What is drawn and how it is shown, with what the model needs of each frame."""

    tokens_per_frame: int = 1
    """Visual tokens of every other frame."""
    grid: int = 0
    """Multi-token baseline: pooled cells a frame (1, 4, 16), stills once; 0: foveated."""

    def __post_init__(self) -> None:
        MixtureConfig.__post_init__(self)  # a class with slots has no super() without arguments
        _require(self.tokens_per_frame >= 1, "tokens_per_frame", self.tokens_per_frame, "at least 1")
        _require(self.grid in GRIDS, "grid", self.grid, f"one of {GRIDS}")
        once = not self.grid or self.tokens_per_frame == 1
        _require(once, "tokens_per_frame", self.tokens_per_frame, f"1 with grid = {self.grid}")

    @property
    def visual_arguments(self) -> dict[str, int]:
        """`looks` and `tokens_per_frame` for `fvlm.data.chat.segments`; a grid is multiplied in by `collate`."""
        return {"looks": 1 if self.grid else self.looks, "tokens_per_frame": self.tokens_per_frame}


def name_base(data: Any) -> None:
    """In the mapping `data` of a run, a mixture given by its name becomes one with that `base`: overrides add to it."""
    if isinstance(data, dict) and isinstance(data.get("mixture"), str):
        data["mixture"] = {"base": data["mixture"]}


def read_base(data: Any, folder: Path) -> None:
    """In the mapping `data` of a run, replace `mixture.base`, a file or a name in `folder`, by what it states.

    Keys beside `base` count more; mappings, such as weights, are merged, and null takes an entry out.

    Raises ConfigError for a base that is not there.
    """
    mixture = data.get("mixture") if isinstance(data, dict) else None
    if not isinstance(mixture, dict) or "base" not in mixture:
        return
    base, changes = mixture["base"], {key: value for key, value in mixture.items() if key != "base"}
    if not isinstance(base, str):
        raise ConfigError(f"data.mixture.base = {base!r}: expected the name or file of a mixture")
    try:
        merged = read_mapping(resolve(base, folder, ".yaml"))
    except ConfigError as error:
        raise ConfigError(f"data.mixture.base: {error}") from None
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = {k: v for k, v in (merged[key] | value).items() if v is not None} if both else value
    data["mixture"] = merged


def _require(condition: bool, key: str, value: object, expected: str) -> None:
    if not condition:
        raise ValueError(f"{key} = {value!r}: expected {expected}")
