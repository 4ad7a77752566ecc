"""How close captions come to reference captions: CIDEr, BLEU-4 and METEOR, by the COCO caption evaluation.

`pycocoevalcap` computes them; its tokenizer and METEOR are Java programs that come with it.
"""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from fvlm.evaluate.statistics import bootstrap_interval
from fvlm.schema import ConfigError

NOTHING = "nothingwassaid"
"""What an empty caption is scored as: one word that no reference has."""


def require_caption_metrics() -> None:
    """Raises ConfigError, saying what to install, where captions cannot be scored."""
    try:
        import pycocoevalcap.bleu.bleu  # noqa: F401
    except ImportError as error:
        raise ConfigError("tasks: captions needs pycocoevalcap: pip install -c constraints.txt -e '.[eval]'") from error
    if shutil.which("java") is None:
        raise ConfigError(
            "tasks: captions needs `java` on PATH (tokenizer and METEOR): install a Java 8 or newer runtime"
        )


def caption_figures(
    captions: Sequence[str], references: Sequence[Sequence[str]], groups: Sequence[str] | None = None
) -> dict[str, Any]:
    """Figures of captions against their references.

    Args:
        captions: one a clip.
        references: one or more a clip.
        groups: of each clip, such as its source; with them there is "by_group", in which CIDEr weighs words as in the
            whole set.

    Returns:
        {"cider", "cider_low", "cider_high", "bleu_4", "meteor", "n", "empty", "cider_by_clip", "flags"}. CIDEr is in
        the metric's own scale (10 is identity); its 95 % interval is a bootstrap over clips, with the words' weights
        as in the whole set. Flags tell of results that mean little.

    Raises:
        ConfigError: no pycocoevalcap or no Java.
        ValueError: no clips, or a clip without a reference.
    """
    if not captions or len(captions) != len(references) or not all(references):
        raise ValueError(
            f"caption_figures: {len(captions)} captions, {len(references)} references: expected one or more each"
        )
    require_caption_metrics()
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    said = [_one_line(text) for text in captions]
    hypotheses = {clip: [{"caption": text or NOTHING}] for clip, text in enumerate(said)}
    truths = {clip: [{"caption": _one_line(x) or NOTHING} for x in texts] for clip, texts in enumerate(references)}
    with contextlib.redirect_stdout(io.StringIO()):  # the package prints its lengths
        hypotheses, truths = _nothing_left(PTBTokenizer().tokenize(hypotheses)), PTBTokenizer().tokenize(truths)
        _, by_clip = Cider().compute_score(truths, hypotheses)
        meteor = Meteor()  # a process that serves any number of sets

        def figures(clips: Sequence[int]) -> dict[str, Any]:
            chosen = [{at: texts[clip] for at, clip in enumerate(clips)} for texts in (truths, hypotheses)]
            cider = [float(by_clip[clip]) for clip in clips]
            low, high = bootstrap_interval(cider)
            return {
                "cider": sum(cider) / len(cider), "cider_low": low, "cider_high": high,
                "bleu_4": float(Bleu(4).compute_score(*chosen)[0][3]),
                "meteor": float(meteor.compute_score(*chosen)[0]),
                "n": len(clips), "empty": sum(not said[clip] for clip in clips),
                "flags": _flags([said[clip] for clip in clips]),
            }  # fmt: skip

        found = figures(range(len(said)))
        members: dict[str, list[int]] = {}
        for clip, group in enumerate(groups or ()):
            members.setdefault(group, []).append(clip)
        if groups is not None:
            found["by_group"] = {group: figures(clips) for group, clips in sorted(members.items())}
    return {**found, "cider_by_clip": [float(x) for x in by_clip]}


def _one_line(text: str) -> str:
    """The tokenizer reads a caption a line, METEOR splits at bars."""
    return " ".join(text.replace("|", " ").split())


def _nothing_left(tokenized: Mapping[int, list[str]]) -> dict[int, list[str]]:
    """Captions of punctuation alone are empty, too, once tokenized."""
    return {clip: [text or NOTHING for text in texts] for clip, texts in tokenized.items()}


def _flags(said: Sequence[str]) -> list[str]:
    flags = []
    if len(said) < 10:
        flags.append(f"{len(said)} clips: words are weighed by how many clips mention them")
    if len(said) >= 10 and len(set(said)) == 1:
        flags.append(f"always says {said[0]!r}")
    if empty := said.count(""):
        flags.append(f"{empty} empty captions")
    return flags
