"""A configuration that cannot be is refused where it is made, naming the key."""

from __future__ import annotations

import pytest

from fvlm.model import tiny_config


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("architecture", "pooled"),
        ("grid", 9),
        ("tokens_per_frame", 0),
        ("default_mode", "fine"),
        ("fine_iterations", 0),
        ("query_logit_scale", -1.0),
        ("query_logit_scale", "free"),
        ("image_size", 50),
    ],
)
def test_a_value_that_cannot_be_is_refused(key, value):
    with pytest.raises(ValueError, match=rf"^{key}: expected .*, got {value!r}"):
        tiny_config(64, **{key: value})


def test_it_survives_a_round_trip(tmp_path):
    config = tiny_config(64, default_mode="coarse_fine", fine_iterations=2, deep_query=False)
    config.save_pretrained(tmp_path)
    assert type(config).from_pretrained(tmp_path).to_dict() == config.to_dict()
