"""What a harness passes on, in the model's terms."""

from __future__ import annotations

import logging

import pytest

from fvlm.evaluate import ranks
from fvlm.evaluate.items import Presentation
from fvlm.hub.harness import at_least_one, cut, flat, generation_options
from fvlm.hub.opening import open_model
from fvlm.schema import ConfigError


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ({}, {"do_sample": False, "max_new_tokens": 128}),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.9}, {"do_sample": False, "max_new_tokens": 128}),
        ({"do_sample": True, "temperature": 0, "top_k": 3}, {"do_sample": False, "max_new_tokens": 128}),
        ({"temperature": 0.7}, {"do_sample": True, "temperature": 0.7, "max_new_tokens": 128}),
        ({"do_sample": True}, {"do_sample": True, "temperature": 1.0, "max_new_tokens": 128}),
        (
            {"do_sample": True, "temperature": 0.2, "top_p": None, "top_k": 5, "max_new_tokens": 7},
            {"do_sample": True, "temperature": 0.2, "top_k": 5, "max_new_tokens": 7},
        ),
        ({"num_beams": 3, "top_p": 1.0}, {"do_sample": False, "max_new_tokens": 128, "num_beams": 3}),
    ],
)
def test_generation_arguments(given, options):
    assert generation_options(given) == (options, [])


def test_texts_that_end_an_answer():
    assert generation_options({"until": "\n\n"})[1] == ["\n\n"]
    assert generation_options({"until": ["\n", "."]})[1] == ["\n", "."]
    assert generation_options({"until": None})[1] == []
    assert cut("one. two\nthree", ["\n", "."]) == "one"
    assert cut("one. two\nthree", ["\n\n", ""]) == "one. two\nthree"


def test_what_means_nothing_is_said_once(caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            generation_options({"image_aspect_ratio": "pad", "modalities": ["video"], "temperature": 0})
    assert [record.getMessage() for record in caplog.records] == [
        "generation arguments that mean nothing to this model are ignored: image_aspect_ratio, modalities"
    ]


def test_media_and_counts():
    assert flat(None) == flat([]) == []
    assert flat("clip.mp4") == ["clip.mp4"]
    assert flat([["a.png", None], ("b.png",), "c.png"]) == ["a.png", "b.png", "c.png"]
    assert (at_least_one("batch_size", "8"), at_least_one("batch_size", 1)) == (8, 1)
    for wrong in ("auto", 0, "-1", 1.5, True):
        with pytest.raises(ConfigError, match=rf"batch_size={wrong}: expected a whole number of at least 1"):
            at_least_one("batch_size", wrong)


def test_alone_a_rank_answers_for_itself(monkeypatch):
    for name, value in {"is_initialized": True, "get_rank": 1, "get_world_size": 2}.items():
        monkeypatch.setattr(ranks.dist, name, lambda value=value: value)
    with ranks.alone():
        assert ranks.rank_and_world() == (0, 1)
        assert ranks.gather_over_ranks("mine") == ["mine"]
    assert ranks.rank_and_world() == (1, 2)


def test_a_run_is_shown_as_its_own_evaluation_shows_it(run):
    opened = open_model(str(run), "tiny")
    mixture = opened.checkpoint.mixture
    assert mixture.looks == 5
    assert opened.presentation == Presentation(
        image_size=opened.checkpoint.config.model.frame_size, grid=mixture.grid, **mixture.visual_arguments
    )
