"""The preference loss against the formula written out, in float64."""

from __future__ import annotations

import math

import pytest
import torch

from fvlm.model.packed import PackedBatch
from fvlm.train.preference import answer_logprobs, preferences


def pack(lengths: list[int], answers: list[int], room: int = 2) -> PackedBatch:
    """Samples of `lengths` rows whose last `answers` tokens are labels; `room` samples and labels stay empty."""
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    rows = [end - count + i - 1 for end, count in zip(bounds[1:], answers, strict=True) for i in range(count)]
    num_rows, zero = bounds[-1] + 3, torch.zeros(0, dtype=torch.int64)
    return PackedBatch(
        frames=torch.zeros(0, 3, 14, 14, dtype=torch.uint8),
        token_ids=torch.zeros(num_rows, dtype=torch.int64),
        position_ids=torch.zeros(num_rows, dtype=torch.int64),
        cu_seqlens=torch.tensor(bounds + [bounds[-1]] * room, dtype=torch.int32),
        loss_index=torch.tensor(rows + [0] * room),
        labels=torch.tensor([1] * len(rows) + [-100] * room),
        visual_index=zero, visual_frame=zero, query_from=zero, coarse_index=zero,
        coarse_cu_seqlens=torch.zeros(len(lengths) + room + 1, dtype=torch.int32),
        source_id=torch.zeros(len(lengths) + room, dtype=torch.int64),
        max_seqlen=max(lengths),
        reference_logprob=torch.randn(len(lengths) + room, generator=torch.Generator().manual_seed(1)),
    )  # fmt: skip


LENGTHS, ANSWERS = [9, 7, 12, 12], [3, 2, 5, 1]


def drawn(batch: PackedBatch) -> torch.Tensor:
    logprobs = -torch.rand(len(batch.labels), generator=torch.Generator().manual_seed(0)) * 3
    return torch.where(batch.labels >= 0, logprobs, 0.0)


def written_out(logprobs: list[float], reference: list[float], beta: float) -> tuple[float, list[float], list[float]]:
    """(loss, rewards, d loss / d each sample's log-probability) in Python's floats."""
    ends = torch.tensor(ANSWERS).cumsum(0).tolist()
    sums = [math.fsum(logprobs[end - count : end]) for end, count in zip(ends, ANSWERS, strict=True)]
    rewards = [beta * (ours - theirs) for ours, theirs in zip(sums, reference, strict=False)]
    loss, gradients = 0.0, []
    for chosen, rejected in zip(rewards[::2], rewards[1::2], strict=True):
        wrong = 1 / (1 + math.exp(chosen - rejected))
        loss -= math.log(1 - wrong)
        gradients += [-beta * wrong, beta * wrong]
    return loss, rewards, gradients


@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_loss_rewards_and_gradients_are_those_of_the_formula(beta):
    batch = pack(LENGTHS, ANSWERS)
    logprobs = drawn(batch).requires_grad_()
    found = preferences(logprobs, batch, beta)
    found.loss.backward()
    loss, rewards, gradients = written_out(logprobs.tolist(), batch.reference_logprob.tolist(), beta)
    assert float(found.loss.detach()) == pytest.approx(loss, rel=1e-6)
    assert float(found.pairs) == 2
    assert float(found.chosen) == pytest.approx(rewards[0] + rewards[2], rel=1e-5)
    assert float(found.rejected) == pytest.approx(rewards[1] + rewards[3], rel=1e-5)
    assert float(found.correct) == sum(a > b for a, b in zip(rewards[::2], rewards[1::2], strict=True))
    expected = [gradient for gradient, count in zip(gradients, ANSWERS, strict=True) for _ in range(count)] + [0, 0]
    assert logprobs.grad.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_reference_equal_to_the_model_gives_log_two_and_no_reward():
    batch = pack(LENGTHS, ANSWERS)
    logprobs = drawn(batch)
    batch.reference_logprob = answer_logprobs(logprobs, batch)
    found = preferences(logprobs, batch, 0.1)
    assert float(found.loss) == pytest.approx(2 * math.log(2), rel=1e-6)
    assert (float(found.chosen), float(found.rejected), float(found.correct)) == (0, 0, 0)


def test_a_pair_that_is_not_a_number_leaves_the_others_as_they_are():
    batch = pack(LENGTHS, ANSWERS)
    logprobs = drawn(batch)
    logprobs[0] = math.nan
    sums = answer_logprobs(logprobs, batch)
    assert sums.isnan().tolist() == [True, False, False, False, False, False]
    assert torch.equal(sums[1:], answer_logprobs(drawn(batch), batch)[1:])


def test_an_empty_pack_has_no_pairs_and_a_gradient_of_zero():
    batch = pack([1, 1], [0, 0])
    batch.cu_seqlens.zero_()
    logprobs = torch.zeros(len(batch.labels), requires_grad=True)
    found = preferences(logprobs, batch, 0.1)
    found.loss.backward()
    assert (float(found.loss.detach()), float(found.pairs)) == (0, 0)
    assert logprobs.grad.tolist() == [0, 0]


def test_a_pack_without_reference_says_so():
    batch = pack(LENGTHS, ANSWERS)
    batch.reference_logprob = None
    with pytest.raises(ValueError, match="reference_logprob is None: expected float32"):
        preferences(drawn(batch), batch, 0.1)
