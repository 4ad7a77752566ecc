"""What the kernels' tests share."""

from __future__ import annotations

import os

import torch

from tests.kernels.tolerances import BACKWARD, FORWARD


def worst(got, reference):
    """Largest error relative to the largest value; below 0.2 it has cancelled: its terms are of size √k, up to 11."""
    got, reference = got.detach().double().cpu(), reference.detach().double().cpu()
    if reference.numel() == 0:
        return 0.0 if got.shape == reference.shape else float("inf")
    error = float((got - reference).abs().max() / reference.abs().max().clamp(min=0.2))
    return error if error == error else float("inf")


def assert_close(names, got, reference, tolerance):
    """Every pair within the ceiling; names (words in one string) those that are not."""
    errors = {name: worst(a, b) for name, a, b in zip(names.split(), got, reference, strict=True)}
    over = {name: error for name, error in errors.items() if not error <= tolerance}
    assert over == {}, f"beyond {tolerance}: {over}"


def forward_tolerance(dtype):
    """The ceiling for results in this dtype."""
    return FORWARD[str(dtype).removeprefix("torch.")]


def backward_tolerance(dtype):
    """The ceiling for gradients in this dtype."""
    return BACKWARD[str(dtype).removeprefix("torch.")]


def in_dtype(tensors, dtype):
    """The same values twice, as leaves that want gradients: exact (float64), and as given to the back end in force."""
    exact = [x.to(dtype).double().requires_grad_() for x in tensors]
    given = [where_it_runs(x.to(dtype)).requires_grad_() for x in tensors]
    return exact, given


def where_it_runs(x):
    """``x`` where the back end in force can take it."""
    return x.to(device_for_triton()) if os.environ.get("FVLM_KERNELS") == "triton" else x


def device_for_triton():
    """Where Triton's kernels run: a GPU if there is one, else the interpreter on the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
