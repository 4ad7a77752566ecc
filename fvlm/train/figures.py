"""Which figures an evaluation during training will give, known before the first step."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from fvlm.config import RunConfig
from fvlm.schema import ConfigError

PREFERENCE_FIGURES = ("preference/loss", "preference/accuracy", "preference/margin")
"""Means over the validation pairs, with `train.objective: dpo`."""


def expected_figures(config: RunConfig, source_names: Iterable[str], choice: Iterable[str]) -> list[str]:
    """Names under which an evaluation of `config` reports.

    Args:
        source_names: of the validation shards.
        choice: further figures, such as `slots/coarse_fine/accuracy`.
    """
    mode, foveated = config.train.mode, config.model.architecture == "foveated"
    compared = mode == "coarse_fine" and foveated
    exists = {
        "val_loss": True,
        "loss_fine": mode != "coarse_only",
        "loss_coarse": mode == "coarse_only" or compared,
        "loss_ratio": compared,
        "attention_entropy": foveated,
    }
    own = [name for name, found in exists.items() if found]
    own += PREFERENCE_FIGURES if config.train.objective == "dpo" else ()
    return [*own, *(f"val_loss/{source}" for source in source_names), *choice]


def require_figures(best_metric: Iterable[str], available: Iterable[str]) -> None:
    """Raises ConfigError, with all that is available, where `best_metric` names a figure that is not."""
    known = sorted(available)
    for name in best_metric:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f" (did you mean {nearest[0]}?)" if nearest else ""
            raise ConfigError(
                f"best_metric = {name!r}: not a figure of this run's evaluation{hint}; "
                f"expected some of {', '.join(known)}"
            )
