"""What plans assume of a stage is what its configurations say."""

from __future__ import annotations

from itertools import product

import pytest

from fvlm.config import load_config
from fvlm.model.configuration import preset_config
from fvlm.model.flops import flops_per_sample
from fvlm.train.gpus import GPUS
from fvlm.train.memory import Parameters
from fvlm.train.work_model import FINE_ITERATIONS, SAMPLES, step_time
from fvlm.train.zero_config import read_zero_json
from fvlm.train_config import CheckpointingConfig


@pytest.mark.parametrize(("stage", "model"), list(product(FINE_ITERATIONS, ["135m", "360m", "1b7"])))
def test_fine_iterations_of_the_stages(stage, model):
    assert load_config(f"{stage}_{model}").train.fine_iterations == FINE_ITERATIONS[stage]


def test_a_step_is_as_long_as_iterations_in_turn_are_on_the_mean():
    geometry, sample = preset_config("135m"), SAMPLES["stage2"]
    once, twice = (flops_per_sample(geometry, sample, fine_iterations=(k,)).training for k in (1, 2))
    common = {"tokens": 16384, "micro_batches": 1, "ranks": 1, "zero": read_zero_json("zero1")[0], "num_ops": 1}
    common |= {"checkpointing": CheckpointingConfig(), "mfu": 0.3}
    parameters = Parameters(all=1, trained=1, largest=1)
    one, turn = (
        step_time(geometry, parameters, sample, GPUS["h100"], **common, fine_iterations=iterations)
        for iterations in ((1,), (1, 2))
    )
    assert turn.compute / one.compute == pytest.approx((once + twice) / 2 / once)
    assert turn.compute > one.compute
