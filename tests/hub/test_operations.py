"""The exported model's operations against the kernels' references in float64."""

from __future__ import annotations

import pytest
import torch

from fvlm.hub import operations
from fvlm.kernels.linear_cross_entropy.reference import linear_cross_entropy_reference
from fvlm.kernels.query_attention.reference import query_attention_reference
from fvlm.kernels.varlen_attention.reference import varlen_attention_reference


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def check(ours: torch.Tensor, expected: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    torch.testing.assert_close(ours, expected)
    weights = torch.linspace(-1, 1, ours.numel(), dtype=ours.dtype).view_as(ours)
    gradients = [torch.autograd.grad((x * weights).sum(), inputs, retain_graph=True) for x in (ours, expected)]
    for got, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(got, wanted)


def test_query_attention():
    q, key, value = drawn(5, 3, 4, seed=0), drawn(2, 7, 3, 4, seed=1), drawn(2, 7, 3, 4, seed=2)
    frame = torch.tensor([0, 0, 0, 1, 1])
    offsets = operations.frame_offsets(frame, 2)
    assert offsets.tolist() == [0, 3, 5]
    ours, expected = (
        operations.query_attention(q, key, value, frame, offsets),
        query_attention_reference(q, key, value, frame),
    )
    for got, wanted, inputs in zip(ours, expected, ([q, key, value], [q, key], [q, key]), strict=True):
        check(got, wanted, inputs)


@pytest.mark.parametrize("bounds", [[0, 4, 9], [0, 9, 9], [0, 3, 7]])
def test_varlen_attention(bounds):
    q, key, value = drawn(9, 4, 8, seed=0), drawn(9, 2, 8, seed=1), drawn(9, 2, 8, seed=2)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    check(
        *(f(q, key, value, cu_seqlens, 9) for f in (operations.varlen_attention, varlen_attention_reference)),
        [q, key, value],
    )


def test_linear_cross_entropy():
    hidden, weight, labels = drawn(6, 5, seed=0), drawn(11, 5, seed=1), torch.tensor([3, -100, 10, 0, -100, 7])
    ours = operations.linear_cross_entropy(hidden, weight, labels)
    check(ours.logprobs, linear_cross_entropy_reference(hidden, weight, labels), [hidden, weight])
    assert ours.num_labels == 4
    torch.testing.assert_close(ours.loss_sum, -ours.logprobs.sum())
