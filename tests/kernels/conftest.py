"""Kernel tests run on poisoned memory: what a kernel forgets to write is NaN, not a lucky zero."""

from __future__ import annotations

import math

import pytest
import torch

with torch.device("meta"):  # torch notes here, once, which functions a device context redirects: the unpoisoned ones
    torch.empty(0)


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch):
    """``torch.empty`` and its kin hand out NaN (floats) or a wild number (int32)."""

    def poisoned(make):
        def function(*args, **kwargs):
            out = make(*args, **kwargs)
            if out.device.type in ("meta",) or torch.compiler.is_compiling():
                return out
            if out.is_floating_point():
                return out.fill_(math.nan)
            return out.fill_(-1234567) if out.dtype == torch.int32 else out

        return function

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


@pytest.fixture
def triton(monkeypatch):
    """Triton serves every op, in its interpreter where there is no GPU."""
    pytest.importorskip("triton")
    monkeypatch.setenv("FVLM_KERNELS", "triton")
