"""DeepSpeed's JSON: filled from the run, and refused where it contradicts it."""

from __future__ import annotations

import json
from typing import ClassVar

import pytest

from fvlm.config import REPOSITORY
from fvlm.schema import ConfigError
from fvlm.train.zero_config import SECTIONS, VALUES, accumulation, fill, read_zero_json
from fvlm.train_config import GroupRate, LearningRates, TrainConfig

RATES = LearningRates(connector=GroupRate(base=1e-3), dino=GroupRate(base=1e-5), llm=GroupRate(base=1e-5))
TRAIN = TrainConfig(total_samples=100, packs_per_step=12, learning_rate=RATES, clip=0.7)
NAMES = sorted(path.stem for path in (REPOSITORY / "ds_configs").glob("*.json"))


def leaves(section, path=""):
    if isinstance(section, dict):
        for key, value in section.items():
            yield from leaves(value, f"{path}.{key}")
    else:
        yield path, section


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_shipped_files_are_filled_completely(name, dtype):
    contents, origin = read_zero_json(name)
    before = json.dumps(contents)
    filled = fill(contents, origin, TRAIN, world_size=3, dtype=dtype)
    assert filled["train_batch_size"] == 12
    assert filled["gradient_accumulation_steps"] == 4
    assert filled["train_micro_batch_size_per_gpu"] == 1
    assert filled["gradient_clipping"] == 0.7
    assert filled["bf16"]["enabled"] == (dtype == "bf16")
    assert "auto" not in [value for _, value in leaves(filled)]
    assert json.dumps(contents) == before


@pytest.mark.parametrize("world_size", range(1, 65))
def test_accumulation_for_every_number_of_ranks(world_size):
    if 12 % world_size == 0:
        assert accumulation(TRAIN, world_size) * world_size == 12
    else:
        with pytest.raises(ConfigError, match=rf"packs_per_step = 12.*{world_size} ranks.*nearest: \d+"):
            accumulation(TRAIN, world_size)


CONTRADICTIONS = [
    ({"gradient_clipping": 1.0}, ["gradient_clipping = 1.0", "0.7", "train.clip"]),
    ({"train_micro_batch_size_per_gpu": 8}, ["train_micro_batch_size_per_gpu = 8", "one pack"]),
    ({"gradient_accumulation_steps": 2}, ["gradient_accumulation_steps = 2", "6", "train.packs_per_step"]),
    ({"train_batch_size": 32}, ["train_batch_size = 32", "12", "train.packs_per_step"]),
    ({"bf16": {"enabled": True}}, ["bf16.enabled = True", "False", "train.dtype"]),
    ({"bf16": True}, ["bf16 = True", "an object"]),
    ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, ["'nvme'", "offload to 'cpu'"]),
    ({"fp16": {"enabled": True}}, ["'fp16'", "train.dtype"]),
    ({"optimizer": {"type": "Adam"}}, ["'optimizer'", "train.learning_rate"]),
    ({"scheduler": {"type": "WarmupLR"}}, ["'scheduler'", "train.schedule"]),
    ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}, ["reduce_bucket_size", '"auto"', "write one"]),
    ({"zero_optimization": {"stage": "auto"}}, ["zero_optimization.stage = 'auto'", "(0, 1, 2, 3)"]),
    ({"zero_optimization": {"stage": "two"}}, ["zero_optimization.stage = 'two'", "(0, 1, 2, 3)"]),
    ({"zero_optimization": {"stage": 7}}, ["zero_optimization.stage = 7", "(0, 1, 2, 3)"]),
    ({"zero_optimization": {"stage": True}}, ["zero_optimization.stage = True", "(0, 1, 2, 3)"]),
    ({"zero_optimization": None}, ["zero_optimization = None", "an object"]),
    ({"zero_optimization": []}, ["zero_optimization = []", "an object"]),
    ({"data_types": None, "zero_optimization": {"stage": 0}}, ["data_types = None", "an object"]),
    ({"zero_optimisation": {"stage": 3}}, ["unknown key zero_optimisation", "{'stage': 3}", "zero_optimization?"]),
    ({"bfloat16": {"enabled": True}}, ["unknown key bfloat16", "did you mean bf16?"]),
    ({"qqq": 1}, ["unknown key qqq = 1", "expected some of", "zero_optimization"]),
]


@pytest.mark.parametrize(("change", "expected"), CONTRADICTIONS, ids=[json.dumps(c) for c, _ in CONTRADICTIONS])
def test_contradictions_name_both_sides(change, expected):
    contents, _ = read_zero_json("zero2")
    with pytest.raises(ConfigError) as caught:
        fill(contents | change, "mine.json", TRAIN, world_size=2, dtype="fp32")
    for part in ["mine.json", *expected]:
        assert part in str(caught.value)


def test_values_that_agree_are_accepted():
    contents, _ = read_zero_json("zero1")
    same = {"gradient_clipping": 0.7, "train_batch_size": 12, "fp16": {"enabled": False}}
    assert fill(contents | same, "mine.json", TRAIN, world_size=2, dtype="fp32")["gradient_clipping"] == 0.7


class Watched(dict):
    """Remembers which keys were asked for."""

    asked: ClassVar[set[str]] = set()

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key):
        self.asked.add(key)
        return super().__contains__(key)

    def keys(self):
        return self

    def __deepcopy__(self, memo):
        return self


def test_the_known_keys_are_those_that_deepspeed_reads():
    """What the installed DeepSpeed asks its JSON for, less what it does so only to refuse or under an old name."""
    from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS, DeepSpeedConfig

    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    DeepSpeedConfig(Watched(dict.fromkeys(sizes, 1)))
    assert Watched.asked - set(_REMOVED_TOP_LEVEL_CONFIG_KEYS) - {"bfloat16"} == {*SECTIONS, *VALUES}


def test_unreadable_files_are_configuration_errors(tmp_path):
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    for name, expected in (("bad", "not valid JSON"), ("list", "expected an object")):
        with pytest.raises(ConfigError, match=expected):
            read_zero_json(str(tmp_path / f"{name}.json"))
    with pytest.raises(ConfigError, match=r"zero9.*zero2_offload"):
        read_zero_json("zero9")
