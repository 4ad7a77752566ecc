"""What a step minimises: sums over labels or pairs, divided once by the whole step's planned count (`Engine.backward`).

`ce_all` and `ce_answer` differ in which labels the packs carry (`fvlm.data.batch`), not in how they are summed; `dpo`
sums over pairs (`fvlm.train.preference`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fvlm.model.packed import PackedBatch
from fvlm.train.preference import Preferences, preferences
from fvlm.train_config import TrainConfig


def call_arguments(train: TrainConfig, fine_iterations: int) -> dict[str, Any]:
    """Arguments of the model's call, beside the batch, in training."""
    return {"mode": train.mode, "fine_iterations": fine_iterations, "coarse_loss": train.lambda_coarse > 0}


def loss_sum(output: Any, batch: PackedBatch, train: TrainConfig) -> tuple[Tensor, Preferences | None]:
    """float32 scalar to minimise, and what `dpo` knows of the pack's pairs.

    Cross-entropy: Σ −log p over the pack's labels, plus `lambda_coarse` times the same with coarse tokens.
    """
    if train.objective == "dpo":
        found = preferences(output.logprobs, batch, train.dpo_beta)
        return found.loss, found
    if train.lambda_coarse == 0:
        return output.loss_sum, None
    return output.loss_sum + train.lambda_coarse * output.coarse_loss_sum, None


def coarse_loss_sum(module: nn.Module, batch: PackedBatch) -> Tensor:
    """float32 scalar: the pack's loss with coarse tokens, without gradient (the probe behind `loss_ratio`)."""
    with torch.no_grad():
        return module(batch=batch, mode="coarse_only").loss_sum


def probes(train: TrainConfig, architecture: str, index: int) -> bool:
    """Whether step `index`, from 0, measures the coarse loss on its own samples before it learns from them."""
    if train.mode != "coarse_fine" or architecture != "foveated" or train.lambda_coarse:
        return False
    if train.objective == "dpo":  # compares answers, not tokens
        return False
    return train.probe_every > 0 and index % train.probe_every == 0
