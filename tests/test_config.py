"""Run configurations: what is wrong is said by key, value and expectation; what is right comes back unchanged."""

from __future__ import annotations

import dataclasses
import json

import pytest
import yaml

from fvlm.config import REPOSITORY, RunConfig, config_hash, load_config, save_config, to_dict
from fvlm.schema import ConfigError, build
from fvlm.train_config import GROUPS

CONFIGS = sorted((REPOSITORY / "launch" / "configs").glob("*.yaml"))


def minimal(**train) -> dict:
    """The shortest valid configuration."""
    rates = {group: {"base": 1e-3} for group in GROUPS}
    base = {"total_samples": 100, "packs_per_step": 2, "learning_rate": rates}
    return {"name": "run", "data": {"train": ["shards"]}, "train": base | train}


def write(path, values) -> str:
    path.write_text(yaml.safe_dump(values))
    return str(path)


WRONG = [
    ("trian.seed=1", ["unknown key trian", "did you mean train?"]),
    ("train.sede=1", ["unknown key train.sede", "did you mean seed?"]),
    ("train.learning_rate.dinov2.base=1", ["unknown key train.learning_rate.dinov2", "dino"]),
    ("train.seed=seven", ["train.seed", "'seven'", "a whole number"]),
    ("train.seed=1.5", ["train.seed", "1.5", "a whole number"]),
    ("train.seed=true", ["train.seed", "True", "a whole number"]),
    ("train.clip=tight", ["train.clip", "'tight'", "a number"]),
    ("train.activation_checkpointing=1", ["train.activation_checkpointing", "1", "true or false"]),
    ("train.activation_checkpointing='False'", ["train.activation_checkpointing", "'False'", "true or false"]),
    ("train.schedule=cosinus", ["train.schedule", "'cosinus'", "cosine", "hold_linear"]),
    ("train.fine_iterations=2", ["train.fine_iterations", "2", "a list of a whole number"]),
    ("train.fine_iterations=[1, two]", ["train.fine_iterations[1]", "'two'"]),
    ("train.fine_iterations=[]", ["train.fine_iterations", "at least 1"]),
    ("train.freeze=[dinov2]", ["train.freeze[0]", "'dinov2'", "connector"]),
    ("train.freeze=[connector, dino, llm]", ["train.freeze", "at least one group left"]),
    ("train.total_samples=0", ["train.total_samples", "0", "at least 1"]),
    ("train.total_samples=null", ["train.total_samples", "None", "a whole number"]),
    ("train.warmup=1.0", ["train.warmup", "below 1"]),
    ("train.schedule=converging", ["train.learning_rate.connector.target", "converging"]),
    ("train.learning_rate.llm.target=1e-5", ["train.learning_rate.llm.target", "1e-05", "else null"]),
    ("train.learning_rate.llm.base=0", ["train.learning_rate.llm.base", "train.freeze"]),
    ("train.betas=[0.9]", ["train.betas", "two numbers"]),
    ("data.train=[]", ["data.train", "at least one shard"]),
    ("data.train=shards", ["data.train", "'shards'", "a list of a string"]),
    ("data.mixture.text_share=14", ["data.mixture.text_share", "14", "between 0 and 1"]),
    ("data.frames=many", ["data.frames", "'many'", "auto"]),
    ("model.preset=135M", ["model.preset", "'135M'", "135m"]),
    ("model.image_size=100", ["model.image_size", "100", "14"]),
    ("model.llm=some/model", ["model.llm", "tiny"]),
    ("best_metric={val_los: 1}", ["best_metric", "val_los", "val_loss"]),
    ("wandb=offline", ["wandb", "'offline'", "mode"]),
    ("train", ["override 'train'", "key=value"]),
    ("train.seed={", ["train.seed={", "not valid YAML"]),
    ("name=", ["name", "a string"]),
]


@pytest.mark.parametrize(("override", "expected"), WRONG, ids=[override for override, _ in WRONG])
def test_what_is_wrong_is_named(tmp_path, override, expected):
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path / "run.yaml", minimal()), [override])
    for part in expected:
        assert part in str(caught.value)


def test_missing_keys_and_files_are_named(tmp_path):
    values = minimal()
    del values["train"]["total_samples"]
    with pytest.raises(ConfigError, match=r"missing key train\.total_samples: expected a whole number"):
        load_config(write(tmp_path / "run.yaml", values))
    with pytest.raises(ConfigError, match=r"'no_such'.*tiny_test"):
        load_config("no_such")


def test_a_key_given_twice_is_an_error(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("name: a\nname: b\n")
    with pytest.raises(ConfigError, match="given twice"):
        load_config(str(path))


def test_numbers_are_read_as_people_write_them(tmp_path):
    overrides = ["train.total_samples=1e6", "train.learning_rate.dino.base=1e-5", "train.clip=2", "data.frames=64"]
    config = load_config(write(tmp_path / "run.yaml", minimal()), overrides)
    assert config.train.total_samples == 1_000_000
    assert isinstance(config.train.total_samples, int)
    assert config.train.learning_rate.dino.base == 1e-5
    assert config.train.clip == 2.0
    assert isinstance(config.train.clip, float)
    assert config.data.frames == 64


def test_nothing_can_be_changed_afterwards():
    config = build(RunConfig, minimal())
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train.seed = 1


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_shipped_configurations_load_and_come_back_unchanged(path, tmp_path):
    config = load_config(path.stem)
    assert config.name == path.stem
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(str(tmp_path / "saved.yaml")) == config
    assert json.loads(json.dumps(to_dict(config))) == to_dict(config)


def test_every_field_has_a_docstring():
    """The text right after a field is its documentation."""
    import ast
    import inspect

    import fvlm.config

    for node in ast.parse(inspect.getsource(fvlm.config)).body:
        if isinstance(node, ast.ClassDef) and node.name not in ("LearningRates",):
            for field, after in zip(node.body, [*node.body[1:], None], strict=True):
                if isinstance(field, ast.AnnAssign):
                    documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                    assert documented, f"{node.name}.{field.target.id}"


HASHED = ["train.seed=1", "data.tokens=99", "train.learning_rate.dino.base=2e-3", "data.train=[other]", "init_from=a"]
OPERATIONAL = ["name=b", "out=b", "data.num_workers=0", "train.log_every=7", "wandb.mode=disabled", "phase=b"]


def test_hash_covers_what_the_result_depends_on_and_nothing_else(tmp_path):
    path = write(tmp_path / "run.yaml", minimal())
    base = config_hash(load_config(path))
    assert config_hash(load_config(path)) == base
    for override in HASHED:
        assert config_hash(load_config(path, [override])) != base, override
    for override in OPERATIONAL:
        assert config_hash(load_config(path, [override])) == base, override
