"""What a step minimises: sums over labels, divided once by the whole step's planned count (`Engine.backward`).

`ce_all` and `ce_answer` differ in which labels the packs carry (`fvlm.data.batch`), not in how they are summed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fvlm.config import TrainConfig
from fvlm.model.packed import PackedBatch


def call_arguments(train: TrainConfig, fine_iterations: int) -> dict[str, Any]:
    """Arguments of the model's call, beside the batch, in training."""
    return {"mode": train.mode, "fine_iterations": fine_iterations, "coarse_loss": train.lambda_coarse > 0}


def loss_sum(output: Any, lambda_coarse: float) -> Tensor:
    """float32 scalar: Σ −log p over the pack's labels, plus `lambda_coarse` times the same with coarse tokens."""
    if lambda_coarse == 0:
        return output.loss_sum
    return output.loss_sum + lambda_coarse * output.coarse_loss_sum


def coarse_loss_sum(module: nn.Module, batch: PackedBatch) -> Tensor:
    """float32 scalar: the pack's loss with coarse tokens, without gradient (the probe behind `loss_ratio`)."""
    with torch.no_grad():
        return module(batch=batch, mode="coarse_only").loss_sum
