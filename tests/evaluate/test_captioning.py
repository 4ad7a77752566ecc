"""Caption metrics against published values, and on texts that trip the tools behind them."""

from __future__ import annotations

import json
import shutil
from functools import cache

import pytest

from fvlm.evaluate import captioning
from fvlm.evaluate.captioning import bootstrap_interval, caption_figures
from fvlm.schema import ConfigError

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="no java")


@needs_java
def test_published_scores_are_reproduced(shared_fixtures):
    folder = shared_fixtures / "captions"
    published = json.loads((folder / "published_scores.json").read_text())["nlgeval_readme"]
    said = (folder / published["hyp"]).read_text().splitlines()
    references = list(zip(*((folder / name).read_text().splitlines() for name in published["refs"]), strict=True))
    found = caption_figures(said, references)
    for ours, theirs in (("bleu_4", "Bleu_4"), ("meteor", "METEOR"), ("cider", "CIDEr")):
        assert found[ours] == pytest.approx(published[theirs], abs=2e-6), ours


@pytest.mark.slow
@needs_java
def test_texts_that_trip_the_tools_are_scored_and_keep_their_places():
    truths = ["a red ball rolls", "two dogs run in snow", "the cat sleeps", "a man cooks soup", "rain on a roof"]
    said = ["", "two dogs run\nin snow", "the cat | sleeps", "...", "rain\u2028on a roof"]
    found = caption_figures(said, [[text] for text in truths])
    assert found["empty"] == 1
    assert found["cider_by_clip"][0] == found["cider_by_clip"][3] == 0
    identical = caption_figures(truths, [[text] for text in truths])["cider_by_clip"]
    assert [found["cider_by_clip"][i] for i in (1, 2, 4)] == pytest.approx([identical[i] for i in (1, 2, 4)])
    assert "1 empty captions" in found["flags"]
    assert found["cider"] == pytest.approx(sum(found["cider_by_clip"]) / 5)
    assert found["cider_low"] <= found["cider"] <= found["cider_high"]


@pytest.mark.slow
@needs_java
def test_one_caption_for_everything_is_flagged():
    found = caption_figures(["a video"] * 10, [[f"clip {n} of things"] for n in range(10)])
    assert found["flags"] == ["always says 'a video'"]


@pytest.mark.slow
@needs_java
def test_words_are_the_packages_own(capfd):
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    texts = [["A man's dog; isn't it?", "Two (2) cats -- 'here'."], ["Café on the rue…"], ["#hash  3.5% @you"], ["…"]]
    theirs = PTBTokenizer().tokenize({n: [{"caption": text} for text in each] for n, each in enumerate(texts)})
    assert "tokenized" in capfd.readouterr().err
    assert captioning._tokenized(texts) == theirs
    assert capfd.readouterr() == ("", "")


def test_a_tokenizer_that_fails_is_said(tmp_path, monkeypatch):
    pytest.importorskip("pycocoevalcap", reason="no pycocoevalcap: pip install -e '.[eval]'")
    java = tmp_path / "java"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for script, said in (
        ("echo no such class >&2; exit 1", "exit code 1: no such class"),
        ("echo one", "1 of 2 lines, exit code 0"),
    ):
        java.write_text(f"#!/bin/sh\n{script}\n")
        java.chmod(0o755)
        with pytest.raises(RuntimeError, match=said):
            caption_figures(["x", "y"], [["y"], ["z"]])


def test_a_meteor_that_ends_is_said_every_time_and_nothing_waits_for_it(tmp_path, monkeypatch):
    pytest.importorskip("pycocoevalcap", reason="no pycocoevalcap: pip install -e '.[eval]'")
    monkeypatch.setattr(captioning, "_meteor", cache(captioning._meteor.__wrapped__))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    java = tmp_path / "java"
    java.write_text('#!/bin/sh\n[ "$1" = -jar ] && echo no room >&2 && exit 3\nfor file; do :; done; cat "$file"\n')
    java.chmod(0o755)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="METEOR's process ended, exit code 3: no room"):
            caption_figures(["x", "y"], [["y"], ["z"]])


def test_what_is_missing_is_said(monkeypatch):
    with pytest.raises(ValueError, match="1 captions, 0 references"):
        caption_figures(["x"], [])
    monkeypatch.setattr(captioning.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="java"):
        caption_figures(["x"], [["y"]])


def test_the_interval_is_that_of_the_mean():
    low, high = bootstrap_interval([0.0, 1.0] * 200)
    standard_error = 0.5 / 400**0.5
    assert low == pytest.approx(0.5 - 1.96 * standard_error, abs=0.01)
    assert high == pytest.approx(0.5 + 1.96 * standard_error, abs=0.01)
