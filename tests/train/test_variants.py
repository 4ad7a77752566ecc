"""Every kind of training that the configuration offers, on two ranks, and what happens when a loss is not finite."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from launched import evaluation_rows, final_weights, step_records
from spawned import run_ranks

from fvlm.config import load_config
from fvlm.data.chat import load_tokenizer
from fvlm.train import guard, objectives
from fvlm.train.build import load_model
from fvlm.train.engine import World
from fvlm.train.figures import expected_figures
from fvlm.train.zero_config import read_zero_json

SHORT = ["train.total_samples=60", "train.eval_every=2", "train.probe_every=2", "train.checkpoint_every=0"]
VARIANTS = {
    "coarse only": ["train.mode=coarse_only"],
    "multi token": ["model.architecture=multi_token", "model.grid=4"],
    "lambda coarse": ["train.lambda_coarse=0.5"],
    "frozen": ["train.freeze=[dino, llm]"],
    "answers": ["train.objective=ce_answer"],
    "checkpointed": ["train.activation_checkpointing=true"],
    "plain": [],
    "seldom recorded": ["train.log_every=100"],
}


def train_config(shards: Path, out: Path, *overrides: str):
    data = [f"data.train=[{shards / 'train'}]", f"data.val=[{shards / 'val'}]", f"out={out}"]
    return load_config("tiny_test", [*data, *SHORT, *overrides])


def run_variants(world: World, shards: Path, out: Path) -> None:
    from launch.train import train

    for name, overrides in VARIANTS.items():
        train(train_config(shards, out / name, *overrides), read_zero_json("zero2"), world)


@pytest.fixture(scope="module")
def variants(shards, tmp_path_factory):
    """A folder with one finished run a variant."""
    out = tmp_path_factory.mktemp("variants")
    run_ranks(run_variants, 2, shards, out)
    return out


@pytest.mark.parametrize("name", VARIANTS)
def test_evaluations_give_the_figures_that_were_announced(variants, shards, name):
    config = train_config(shards, variants / name, *VARIANTS[name])
    announced = expected_figures(config, ["colours", "words"], [])
    summary = json.loads((variants / name / "run_summary.json").read_text())
    assert set(summary["final_metrics"]) == set(announced)


@pytest.mark.parametrize("name", VARIANTS)
def test_learns_and_records(variants, name):
    records, rows = step_records(variants / name), evaluation_rows(variants / name)
    losses = [record["train_loss"] for record in records]
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0]
    assert all(record["grad_norm"] > 0 for record in records)
    assert float(rows[-1]["val_loss"]) < float(rows[0]["val_loss"])


def test_coarse_only_has_no_fine_loss(variants):
    for record in step_records(variants / "coarse only"):
        assert record["loss_fine"] is None
        assert record["loss_coarse"] == record["train_loss"]


def test_multi_token_has_no_coarse_loss(variants):
    assert all(record["loss_coarse"] is None for record in step_records(variants / "multi token"))


def test_lambda_coarse_adds_the_same_loss_with_coarse_tokens_at_every_step(variants):
    for record in step_records(variants / "lambda coarse"):
        assert record["train_loss"] == pytest.approx(record["loss_fine"] + 0.5 * record["loss_coarse"])
        assert record["loss_ratio"] == pytest.approx(record["loss_fine"] / record["loss_coarse"])


def of_the_step_alone(record: dict) -> dict:
    """Without the fill of the packs, which is that of all steps since the record before."""
    return {key: value for key, value in record.items() if not key.startswith(("fill_", "samples_per_pack"))}


def test_a_probed_step_is_recorded_whatever_log_every_says(variants):
    records = list(map(of_the_step_alone, step_records(variants / "seldom recorded")))
    probed = [record for record in step_records(variants / "plain") if record["loss_ratio"] is not None]
    assert records == list(map(of_the_step_alone, probed))
    assert [record["step"] for record in records] == list(range(1, len(records) * 2, 2))


def test_activation_checkpointing_changes_nothing(variants):
    with_it, without = step_records(variants / "checkpointed"), step_records(variants / "plain")
    assert [r["train_loss"] for r in with_it] == pytest.approx([r["train_loss"] for r in without], rel=1e-6)


def test_frozen_groups_keep_their_weights(variants, shards):
    model = load_model(train_config(shards, variants / "frozen"), len(load_tokenizer("tiny")))
    initial = {name: p.detach() for name, p in model.named_parameters()}
    trained = final_weights(variants / "frozen")
    assert torch.equal(trained["llm.model.embed_tokens.weight"], initial["llm.model.embed_tokens.weight"])
    assert torch.equal(trained["encoder.dino.layernorm.weight"], initial["encoder.dino.layernorm.weight"])
    assert not torch.equal(trained["dino_to_llm.weight"], initial["dino_to_llm.weight"])


def run_broken_sample(world: World, shards: Path, out: Path) -> tuple[str, str]:
    """From step 3 on, one label of the second sample in rank 1's pack is NaN. Returns the message and the sample."""
    from launch.train import train

    seen: list[list[str]] = []
    original_suspects, original_loss = guard.suspects, objectives.loss_sum
    calls = iter(range(1000))

    def loss_sum(output, *rest):
        loss, pairs = original_loss(output, *rest)
        if next(calls) < 3 or world.rank == 0:
            return loss, pairs
        output.logprobs = torch.full_like(output.logprobs, math.nan)
        return loss * math.nan, pairs

    def suspects(scored):
        pack = scored[0]
        seen.append(list(pack.keys))
        rows = pack.loss_index
        second = (rows >= pack.cu_seqlens[1]) & (rows < pack.cu_seqlens[2])
        return original_suspects([pack._replace(logprobs=torch.where(second, pack.logprobs, 0.0))])

    objectives.loss_sum, guard.suspects = loss_sum, suspects
    try:
        train(train_config(shards, out, "train.guard.policy=stop"), read_zero_json("zero2"), world)
    except guard.DivergenceError as error:
        return str(error), seen[0][1] if world.rank else ""
    return "trained on", ""


def test_a_loss_that_is_not_finite_stops_all_ranks_and_names_step_and_sample(shards, tmp_path):
    (message, _), (other, key) = run_ranks(run_broken_sample, 2, shards, tmp_path)
    assert message == other
    assert message.startswith(f"step 4: loss is nan; samples: rank 1: {key}. The weights were not updated")
    assert [record["step"] for record in step_records(tmp_path)] == [1, 2, 3]
