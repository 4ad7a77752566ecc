"""The baseline and its variants give the product's loss, gradients and updates, whatever is in a batch."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.naive import NaiveTrainer, NaiveVLM, normalise
from benchmarks.naive_ladder import LADDER
from fvlm.data.batch import LoadedSample, collate
from fvlm.data.capacities import Capacities
from fvlm.data.chat import Text, Visual
from fvlm.model import PackedBatch, build_model, tiny_config
from fvlm.train import objectives
from fvlm.train.optimizer import build_adamw, set_rates
from fvlm.train.preference import answer_logprobs
from fvlm.train_config import GroupRate, LearningRates, TrainConfig

VOCABULARY, SIZE = 64, 56
CAPACITIES = Capacities(frames=20, tokens=200, visual=40, coarse=120, samples=8, labels=160, max_seqlen=60)
# an int is that many text tokens, a tuple looks at these of the sample's own frames
KINDS = {
    "video": [(0, 1, 2, 3, 4), 9],
    "still": [(0,) * 8, 6],
    "question_first": [5, (0, 1, 2), 7],
    "narrated": [4, (0,), 2, (1,), 3, (2,), 2],
    "images": [(0, 1, 2), 12],
    "text": [21],
    "visual_last": [4, (0, 1)],
    "streamed": [(0,), 3, (1,), 4],
}
MIXES = {
    "all": list(KINDS),
    "no padding": ["video", "still", "video"],  # 14 positions each: the masks are left to SDPA
    "text only": ["text", "text"],
}
RATES = {"connector": 1e-2, "dino": 1e-3, "llm": 2e-3}


def draw(kinds: list[str], seed: int = 0, pairs: bool = False) -> list[LoadedSample]:
    """Samples with random tokens, answers and frames; of a pair, the second shares the first one's frames."""
    random = np.random.default_rng(seed)
    samples = []
    for kind in kinds:
        count = 1 + max((max(piece) for piece in KINDS[kind] if isinstance(piece, tuple)), default=-1)
        frames = random.integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8).transpose(0, 3, 1, 2)
        for extra in (0, 3) if pairs else (0,):
            parts = [_part(piece, random) for piece in KINDS[kind]] + [_part(2 + extra, random)]
            parts[-1].is_answer[-1] = True
            samples.append(LoadedSample(key=kind, segments=parts, frames=frames, source_id=0))
    return samples


def _part(piece, random) -> Text | Visual:
    if isinstance(piece, tuple):
        return Visual(piece)
    return Text(random.integers(3, VOCABULARY, piece).astype(np.int32), random.random(piece) < 0.6)


def make(dtype=torch.float32):
    torch.manual_seed(0)
    return build_model(tiny_config(VOCABULARY)).to(dtype).train()


def settings(objective="ce_answer", **overrides) -> TrainConfig:
    rates = LearningRates(**{name: GroupRate(base=rate) for name, rate in RATES.items()})
    return TrainConfig(
        total_samples=8, packs_per_step=1, learning_rate=rates, objective=objective, dtype="fp32", **overrides
    )


def pack(samples, objective) -> PackedBatch:
    """The product's batch, its frames normalised beforehand as the baseline's are."""
    batch = collate(samples, CAPACITIES, objective, SIZE)
    return replace(batch, frames=normalise(batch.frames.numpy()))


def product_losses(model, samples, objective) -> torch.Tensor:
    """Σ −log p of each sample."""
    batch = pack(samples, objective)
    return -answer_logprobs(model(batch=batch, mode="coarse_fine").logprobs, batch)[: len(samples)]


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(got, expected, relative: float) -> None:
    """Norm of the difference over the norm, parameter by parameter.

    A key bias moves all scores of a query alike: its gradient is rounding, here a 1e-5th of the whole norm at most.
    """
    assert got.keys() == expected.keys()
    whole = float(torch.stack([g.norm() for g in expected.values()]).norm())
    for name, reference in expected.items():
        difference = float((got[name] - reference).norm())
        assert difference <= relative * max(float(reference.norm()), 1e-5 * whole), name
    flat, flat_reference = (torch.cat([g[name].flatten() for name in expected]) for g in (got, expected))
    assert torch.cosine_similarity(flat, flat_reference, dim=0) > 0.9999


PADDED_AND_PACKED = ("naive", "loss_positions", "packed")


@pytest.mark.parametrize(
    ("variant", "mix", "dtype", "objective"),
    [
        *((variant, "all", torch.float64, "ce_answer") for variant in LADDER),
        *((variant, "no padding", torch.float64, "ce_all") for variant in PADDED_AND_PACKED),
        *((variant, "text only", torch.float64, "ce_answer") for variant in PADDED_AND_PACKED),
        *((variant, "all", torch.float32, "ce_all") for variant in ("naive", "packed")),
    ],
)
def test_losses_and_gradients_are_the_products(variant, mix, dtype, objective):
    """Every sample's loss, every parameter's gradient: 1e-9 relative in float64; 1e-5 and 1e-4 in float32."""
    loss_tolerance, gradient_tolerance = (1e-9, 1e-9) if dtype == torch.float64 else (1e-5, 1e-4)
    model, samples = make(dtype), draw(MIXES[mix])
    naive = LADDER[variant](model)
    expected = product_losses(model, samples, objective)
    got = naive(naive.collate(samples, objective))
    torch.testing.assert_close(got, expected, rtol=loss_tolerance, atol=0)
    expected.sum().backward()
    got.sum().backward()
    assert_same_gradients(gradients(naive), gradients(model), gradient_tolerance)


@pytest.mark.parametrize(
    ("variant", "objective"), [("naive", "ce_answer"), ("naive", "dpo"), ("stills_once", "dpo"), ("packed", "dpo")]
)
def test_two_steps_in_micro_batches_are_the_products(variant, objective):
    """Against the product's loss on one pack, with the reference's log-probabilities cached, and its optimizer.

    In float64, where Adam's eps outweighs gradients that are rounding alone.
    """
    is_dpo, kinds = objective == "dpo", ["still", "narrated", "text"]
    model, train = make(torch.float64), settings(objective, clip=0.1)
    trainer = NaiveTrainer(LADDER[variant](model), train, "cpu", batch_size=2)
    reference, optimizer = copy.deepcopy(model), build_adamw(model, train)
    for seed in range(2):
        samples = draw(kinds, seed, pairs=is_dpo)
        batch = pack(samples, objective)
        planned = len(kinds) if is_dpo else int((batch.labels >= 0).sum())
        if is_dpo:
            with torch.no_grad():
                batch.reference_logprob = answer_logprobs(reference(batch=batch).logprobs, batch)
        loss, _ = objectives.loss_sum(model(batch=batch), batch, train)
        (loss / planned).backward()
        assert torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip) > train.clip
        set_rates(optimizer.param_groups, RATES)
        optimizer.step()
        optimizer.zero_grad()
        assert float(trainer.step(samples, RATES, planned)) == pytest.approx(loss.item(), rel=1e-6)
    before, after = dict(reference.named_parameters()), dict(trainer.model.named_parameters())
    for name, expected in model.named_parameters():
        moved = (expected - before[name]).norm()
        assert moved > 0 or name.endswith("mask_token"), name
        assert (after[name] - expected).norm() <= 1e-5 * max(moved, 1e-6), name  # key biases hardly move


def test_batches_hold_what_their_variant_says():
    samples = draw(["still", "video", "text"])
    frames = {name: len(variant.collate(samples, "ce_answer").frames) for name, variant in LADDER.items()}
    assert frames == {"naive": 13, "kv_once": 13, "stills_once": 6, "loss_positions": 6, "packed": 6}
    pairs = draw(["still"], pairs=True)
    assert len(LADDER["naive"].collate(pairs, "dpo").frames) == 16
    assert len(LADDER["packed"].collate(pairs, "dpo").frames) == 1
    padded, packed = (LADDER[name].collate(samples, "ce_answer") for name in ("naive", "packed"))
    assert padded.token_ids.shape == (3, 23)
    assert padded.prefix == 8
    assert packed.token_ids.shape == (16 + 16 + 23,)
    packed.validate()


def test_bf16_by_autocast_stays_near_fp32():
    """fp32 parameters, products in bfloat16: 1 % of the loss."""
    samples = draw(["still", "images", "text"])
    for variant in (LADDER["naive"], LADDER["packed"]):
        trainers = [NaiveTrainer(variant(make()), replace(settings(), dtype=d), "cpu", 4) for d in ("fp32", "bf16")]
        exact, rounded = (float(trainer.step(samples, RATES, 100)) for trainer in trainers)
        assert exact != rounded
        assert rounded == pytest.approx(exact, rel=1e-2)
        assert {p.dtype for p in trainers[1].model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("overrides", "train", "named"),
    [
        ({"deep_query": False}, {}, "deep"),
        ({"query_logit_scale": 2.0}, {}, "query_logit_scale"),
        ({}, {"mode": "coarse_only"}, "train.mode"),
        ({}, {"fine_iterations": (1, 2)}, "train.fine_iterations"),
        ({}, {"freeze": ("dino",)}, "train.freeze"),
    ],
)
def test_what_the_baseline_does_not_do_is_refused(overrides, train, named):
    with pytest.raises(ValueError, match=named):
        NaiveTrainer(NaiveVLM(build_model(tiny_config(VOCABULARY, **overrides))), settings(**train), "cpu", 1)
