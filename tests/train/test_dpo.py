"""Preference training on pairs whose chosen answer names the colour that is seen."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from launched import arguments, finish, launch, run, step_records
from safetensors.numpy import load_file
from spawned import run_ranks

from fvlm.config import load_config
from fvlm.data.chat import load_tokenizer
from fvlm.data.plan import PlanState
from fvlm.data.shard import ShardWriter
from fvlm.data.video import encode_jpeg
from fvlm.evaluate.during_training import validation_pairs, validation_suite
from fvlm.schema import ConfigError
from fvlm.train import objectives
from fvlm.train.build import load_data, load_model, open_loader
from fvlm.train.engine import World, world_from_environment
from fvlm.train.heartbeat import Heartbeat
from fvlm.train.preference import answer_logprobs
from fvlm.train.reference import TRAINING, VALIDATION, reference_logprobs

COLOURS = {"red": (230, 20, 20), "green": (20, 220, 20), "blue": (20, 20, 230)}
DPO = [
    "train.objective=dpo",
    "train.fine_iterations=[1]",
    "train.schedule=constant",
    "train.learning_rate={connector: {base: 1e-3}, dino: {base: 1e-3}, llm: {base: 1e-3}}",
    "data.mixture={}",
    "data.val=[]",
    "train.packs_per_step=4",
    "train.checkpoint_every=0",
]


@pytest.fixture(scope="module")
def preferences(tmp_path_factory):
    """`train`: 120 pairs about stills of one colour, and three samples that are no pairs; `val`: 20 others, and one."""
    folder, random = tmp_path_factory.mktemp("preferences"), np.random.default_rng(0)
    for name, size, plain in (("train", 123, 41), ("val", 21, 21)):
        with ShardWriter(folder / name, load_tokenizer("tiny"), 40) as writer:
            for number in range(size):
                right, wrong = random.choice(list(COLOURS), 2, replace=False)
                noise = random.integers(0, 99, (56, 56, 3), np.uint8)
                frame = np.full((56, 56, 3), COLOURS[right], np.uint8) // 2 + noise
                meta = {"key": f"p{number:03d}", "kind": "image", "source": "toy", "duration": 0.0, "frame_count": 1}
                said = {"chosen": f"It is {right}.", "rejected": f"It is {wrong}, I think."}
                said = {"assistant": right} if number % plain == plain - 1 else said
                writer.write(meta | {"user": "Which colour?"} | said, [encode_jpeg(frame)])
    return folder


def configure(preferences: Path, out: Path, *overrides: str):
    line = [item for item in arguments(preferences, out, *DPO, *overrides) if "=" in item]
    return load_config("tiny_test", [*line, f"out={out}"])


def validated(preferences: Path) -> list[str]:
    return [f"data.val=[{preferences / 'val'}]", "best_metric={preference/accuracy: 1.0}", "train.eval_every=4"]


def test_pairs_share_their_frames_and_samples_that_are_none_are_refused(preferences, tmp_path):
    config = configure(preferences, tmp_path)
    data, world = load_data(config), world_from_environment()
    loader = open_loader(config, data, world, PlanState(), np.zeros((len(data.table), 2), np.float32))
    step = next(iter(loader))
    assert data.plan.refused["no_loss_tokens"] >= 1
    assert step.step.planned == step.step.samples == sum(len(keys) for keys in step.keys) / 2
    for batch, keys, rows in zip(step.batches, step.keys, step.rows, strict=True):
        batch.validate()
        assert rows[::2] == rows[1::2]
        assert [f"{key} (rejected)" for key in keys[::2]] == keys[1::2]
        looks = batch.visual_frame[batch.visual_index < len(batch.token_ids)]
        assert looks.bincount().tolist()[: len(keys) // 2] == [16] * (len(keys) // 2)  # eight looks of each answer


def test_cached_and_live_reference_give_equal_losses(preferences, tmp_path):
    """fp32; packed otherwise, so the sums' order differs: 1e-4 on log-probabilities of -50 or so."""
    config = configure(preferences, tmp_path)
    data, world = load_data(config), world_from_environment()
    cached = reference_logprobs(config, {TRAINING: data}, world, False, Heartbeat(0, 1))[TRAINING]
    assert cached.shape == (len(data.table), 2)
    assert np.isnan(cached).any(1).sum() == (np.asarray(data.table.rejected_answer) == 0).sum() == 3
    model = load_model(config, len(data.tokenizer)).eval()
    compared = 0
    for loaded in open_loader(config, data, world, PlanState(), cached):
        for batch in loaded.batches:
            with torch.no_grad():
                out = model(batch=batch, **objectives.call_arguments(config.train, 1))
            live = answer_logprobs(out.logprobs, batch)
            torch.testing.assert_close(batch.reference_logprob, live, rtol=0, atol=1e-4)
            loss, pairs = objectives.loss_sum(out, batch, config.train)
            batch.reference_logprob = live
            expected, _ = objectives.loss_sum(out, batch, config.train)
            assert float(loss) == pytest.approx(float(expected), abs=1e-5)
            compared += int(pairs.pairs)
    assert compared > 100


def test_reference_is_kept_found_again_and_made_anew_for_other_weights(preferences, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(
        "fvlm.train.reference._compute",
        lambda model, config, data, *others: made.append(1) or np.full((len(data.table), 2), len(made), np.float32),
    )
    cache, world = f"data.cache_dir={tmp_path / 'cache'}", world_from_environment()

    def found(out: str, *overrides: str, resumed: bool = False) -> float:
        config = configure(preferences, tmp_path / out, cache, *overrides)
        sets = {TRAINING: load_data(config)}
        return float(reference_logprobs(config, sets, world, resumed, Heartbeat(0, 1))[TRAINING][0, 0])

    assert [found("a"), found("a", resumed=True), found("b"), found("b")] == [1, 1, 1, 1]
    assert found("adapters", "train.lora={dora: true}") == 1  # the start itself, without them
    assert found("c", "train.seed=7") == 2  # other weights of the start
    assert found("d", "data.mixture.looks=3") == 3  # another way of asking
    (tmp_path / "a" / TRAINING).write_bytes(b"damaged")
    with pytest.raises(ConfigError, match="missing, or not of this run's data"):
        found("a", resumed=True)
    shutil.rmtree(tmp_path / "cache")
    assert found("a") == 4


@pytest.mark.parametrize(
    "override",
    ["train.fine_iterations=[1, 2]", "train.lambda_coarse=0.5", "data.mixture.question_first=0.5", "train.dpo_beta=0"],
)
def test_what_would_ask_the_reference_in_two_ways_is_refused(preferences, tmp_path, override):
    with pytest.raises(ConfigError, match=override.partition("=")[0]):
        configure(preferences, tmp_path, override)


@pytest.mark.slow
def test_a_toy_set_is_learned_to_more_than_95_percent(preferences, tmp_path):
    run(arguments(preferences, tmp_path, *DPO, "train.total_samples=2400"), world_size=2)
    records = step_records(tmp_path)
    assert records[0]["train_loss"] == pytest.approx(np.log(2), abs=1e-4)
    assert records[0]["reward_margin"] == pytest.approx(0, abs=1e-4)
    last = records[-10:]
    assert np.mean([record["reward_accuracy"] for record in last]) > 0.95
    assert np.mean([record["reward_margin"] for record in last]) > 0


@pytest.mark.slow
def test_one_and_two_ranks_and_every_stage_give_the_same_curve(preferences, tmp_path):
    """fp32, 1e-4 relative on the loss and 1e-4 absolute on rewards; other sums in another order."""
    curves = {}
    for zero, world_size in (("zero0", 1), ("zero2", 2), ("zero3", 2)):
        out = tmp_path / zero
        run(arguments(preferences, out, *DPO, "train.total_samples=96", zero=zero), world_size=world_size)
        curves[zero] = step_records(out)
    for zero in ("zero2", "zero3"):
        for ours, theirs in zip(curves[zero], curves["zero0"], strict=True):
            assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-4)
            for name in ("reward_chosen", "reward_rejected", "reward_margin"):
                assert ours[name] == pytest.approx(theirs[name], abs=1e-4)
            assert ours["samples_seen"] == theirs["samples_seen"]


def gathered(world: World, preferences: Path, out: Path) -> list[float]:
    config = configure(preferences, out)
    sets = {TRAINING: load_data(config)}
    return reference_logprobs(config, sets, world, False, Heartbeat(0, 1))[TRAINING].tolist()


def test_two_ranks_share_the_work_and_both_have_all_of_it(preferences, tmp_path):
    first, second = run_ranks(gathered, 2, preferences, tmp_path / "two")
    np.testing.assert_array_equal(first, second)
    alone = gathered(world_from_environment(), preferences, tmp_path / "one")
    np.testing.assert_allclose(first, alone, rtol=0, atol=1e-4)
    assert load_file(tmp_path / "two" / TRAINING)["logprob"].tolist()[0] == first[0]


@pytest.mark.slow
def test_killed_and_started_again_equals_undisturbed(preferences, tmp_path):
    command = arguments(preferences, tmp_path / "killed", *DPO, "train.total_samples=240", "train.checkpoint_every=2")
    processes = launch(command, 2)
    metrics = tmp_path / "killed/metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 4:
        assert all(process.poll() is None for process in processes), finish(processes)
    for process in processes:
        process.kill()
        process.wait()
    run(command, 2)
    run(arguments(preferences, tmp_path / "whole", *DPO, "train.total_samples=240", "train.checkpoint_every=2"), 2)
    killed, whole = (step_records(tmp_path / name) for name in ("killed", "whole"))
    assert json.dumps(killed) == json.dumps(whole)


@pytest.mark.slow
def test_validation_pairs_are_judged_beside_the_reference(preferences, tmp_path):
    """Two ranks against the formula, pair by pair, with a reference and a trained model in memory; fp32, 1e-4."""
    run(arguments(preferences, tmp_path, *DPO, *validated(preferences), "train.total_samples=240"), world_size=2)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in lines if line["kind"] == "evaluation"]
    assert len(evaluations) > 1
    assert all(line["score"] == line["preference/accuracy"] for line in evaluations)
    kept = load_file(tmp_path / VALIDATION)["logprob"]
    assert kept.shape == (21, 2)
    assert np.isnan(kept).any(1).sum() == 1

    config = configure(preferences, tmp_path, *validated(preferences))
    data, world = load_data(config), world_from_environment()
    suite = validation_suite(config, data, world)
    sets = {TRAINING: data, VALIDATION: validation_pairs(suite)}
    again = reference_logprobs(config, sets, world, True, Heartbeat(0, 1))  # as a resumed run does
    np.testing.assert_array_equal(again[VALIDATION], kept)
    assert again[TRAINING].shape == (123, 2)
    latest = tmp_path / "checkpoints" / (tmp_path / "checkpoints/latest").read_text().strip()
    models = [load_model(config, len(data.tokenizer), found).eval() for found in (latest, None)]
    gains = []
    for loaded in suite.batches():
        for batch in loaded.batches:
            with torch.no_grad():
                ours, theirs = (answer_logprobs(model(batch=batch).logprobs, batch) for model in models)
            gains += (ours - theirs)[: len(loaded.keys[0])].view(-1, 2).tolist()
    margin = 0.1 * np.subtract(*np.transpose(gains))
    assert len(margin) == 20
    last = evaluations[-1]
    assert last["preference/loss"] == pytest.approx(np.log1p(np.exp(-margin)).mean(), abs=1e-4)
    assert last["preference/margin"] == pytest.approx(margin.mean(), abs=1e-4)
    assert last["preference/accuracy"] == np.mean(margin > 0)
    assert last["preference/loss"] < np.log(2)
    summary = json.loads((tmp_path / "run_summary.json").read_text())
    assert summary["convergence_step"] == last["step"]  # by preference/loss, which still falls


def test_a_validation_set_without_pairs_is_refused(preferences, tmp_path):
    with ShardWriter(tmp_path / "plain", load_tokenizer("tiny"), 40) as writer:
        meta = {"key": "t", "kind": "text", "source": "toy", "duration": 0.0, "frame_count": 0}
        writer.write(meta | {"user": "Which colour?", "assistant": "None."}, [])
    config = configure(preferences, tmp_path, f"data.val=[{tmp_path / 'plain'}]")
    with pytest.raises(ConfigError, match=r"data\.val = .*no preference pair"):
        validation_suite(config, load_data(config), world_from_environment())
