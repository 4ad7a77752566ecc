"""How close captions come to reference captions: CIDEr, BLEU-4 and METEOR, by the COCO caption evaluation.

`pycocoevalcap` computes them; its tokenizer and METEOR are Java programs that come with it.
"""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from fvlm.evaluate.statistics import bootstrap_interval
from fvlm.schema import ConfigError

logger = logging.getLogger(__name__)
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
        RuntimeError: the tokenizer or METEOR failed; with what it said.
    """
    if not captions or len(captions) != len(references) or not all(references):
        raise ValueError(
            f"caption_figures: {len(captions)} captions, {len(references)} references: expected one or more each"
        )
    require_caption_metrics()
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider

    said = [_one_line(text) for text in captions]
    hypotheses = _nothing_left(_tokenized([[text] for text in said]))
    truths = _tokenized([[_one_line(text) for text in texts] for texts in references])
    with contextlib.redirect_stdout(io.StringIO()):  # the package prints its lengths
        _, by_clip = Cider().compute_score(truths, hypotheses)

        def figures(clips: Sequence[int]) -> dict[str, Any]:
            chosen = [{at: texts[clip] for at, clip in enumerate(clips)} for texts in (truths, hypotheses)]
            cider = [float(by_clip[clip]) for clip in clips]
            low, high = bootstrap_interval(cider)
            return {
                "cider": sum(cider) / len(cider), "cider_low": low, "cider_high": high,
                "bleu_4": float(Bleu(4).compute_score(*chosen)[0][3]),
                "meteor": _meteor_score(*chosen),
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


def _tokenized(texts: Sequence[Sequence[str]]) -> dict[int, list[str]]:
    """Lower-case words of each clip's texts, without punctuation.

    The package's own call of its Java program lets that talk on the terminal, and does not notice when it fails.
    """
    from pycocoevalcap.tokenizer import ptbtokenizer as ptb

    lines = [text or NOTHING for each in texts for text in each]
    with tempfile.TemporaryDirectory(prefix="fvlm-captions-") as folder:
        file = Path(folder) / "lines.txt"
        file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        command = ["java", "-cp", str(Path(ptb.__file__).with_name(ptb.STANFORD_CORENLP_3_4_1_JAR))]
        command += ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase", str(file)]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    logger.debug("the caption tokenizer: %s", done.stderr.strip())
    found = done.stdout.removesuffix("\n").split("\n")
    if done.returncode or len(found) != len(lines):
        raise RuntimeError(
            f"the caption tokenizer gave {len(found)} of {len(lines)} lines, exit code {done.returncode}: "
            f"{done.stderr.strip()}"
        )
    words = (" ".join(word for word in line.split() if word not in ptb.PUNCTUATIONS) for line in found)
    return {clip: [next(words) for _ in each] for clip, each in enumerate(texts)}


@cache
def _meteor() -> Any:
    """The package's METEOR, a process that serves any number of sets and lives as long as this one.

    It reads its tables for seconds before it answers first: an evaluation in three modes starts it once.
    """
    from pycocoevalcap.meteor.meteor import Meteor

    return Meteor()


def _meteor_score(truths: Mapping[int, list[str]], hypotheses: Mapping[int, list[str]]) -> float:
    meteor = _meteor()
    try:
        return float(meteor.compute_score(truths, hypotheses)[0])
    except (OSError, ValueError) as error:  # it reads an answer that is not there as an empty one
        _meteor.cache_clear()
        meteor.lock.release()  # which the package took and leaves taken: its end would wait for it
        meteor.meteor_p.kill()
        said = meteor.meteor_p.communicate()[1].decode(errors="replace").strip()
        raise RuntimeError(f"METEOR's process ended, exit code {meteor.meteor_p.returncode}: {said}") from error


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
