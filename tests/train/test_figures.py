"""The figures announced before the first step are those that evaluations report."""

from __future__ import annotations

import pytest

from fvlm.config import load_config
from fvlm.schema import ConfigError
from fvlm.train.figures import expected_figures, require_figures

ALWAYS = {"val_loss", "val_loss/a", "slots/coarse_fine/accuracy"}
CASES = {
    ("coarse_fine", "foveated"): {"loss_fine", "loss_coarse", "loss_ratio", "attention_entropy"},
    ("coarse_only", "foveated"): {"loss_coarse", "attention_entropy"},
    ("coarse_fine", "multi_token"): {"loss_fine"},
    ("coarse_only", "multi_token"): {"loss_coarse"},
}


@pytest.mark.parametrize(("mode", "architecture"), CASES)
def test_figures_of_every_mode_and_architecture(mode, architecture):
    config = load_config("tiny_test", [f"train.mode={mode}", f"model.architecture={architecture}"])
    names = expected_figures(config, ["a"], ["slots/coarse_fine/accuracy"])
    assert set(names) == ALWAYS | CASES[mode, architecture]
    assert len(set(names)) == len(names)


def test_preference_runs_report_how_pairs_are_judged():
    config = load_config("dpo_135m")
    names = expected_figures(config, [], [])
    require_figures({"preference/loss": -1.0, "preference/accuracy": 1.0, "preference/margin": 0.1}, names)
    with pytest.raises(ConfigError, match="not a figure"):
        require_figures({"preference/loss": -1.0}, expected_figures(load_config("stage2_135m"), [], []))


def test_an_unknown_one_is_said_with_the_nearest_and_all():
    with pytest.raises(ConfigError, match=r"'val_loss/aa'.*did you mean val_loss/a\?.*some of val_loss, val_loss/a$"):
        require_figures({"val_loss": 1.0, "val_loss/aa": 1.0}, ["val_loss/a", "val_loss"])
    require_figures({"val_loss": 1.0}, ["val_loss/a", "val_loss"])
