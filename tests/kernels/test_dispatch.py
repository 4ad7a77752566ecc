"""Who serves a call, and what happens when nobody can."""

from __future__ import annotations

import logging

import pytest
import torch

from fvlm.kernels import dispatch
from fvlm.kernels.dispatch import Backend, select

ONE = Backend("triton", lambda: "triton", lambda probe: "no GPU here")
TWO = Backend("torch", lambda: "torch")
PROBE = torch.zeros(1)


def test_auto_takes_the_first_that_can_and_says_so_once(monkeypatch, caplog):
    monkeypatch.delenv("FVLM_KERNELS", raising=False)
    monkeypatch.setattr(dispatch, "_logged", set())
    with caplog.at_level(logging.INFO):
        assert select("an_op", (ONE, TWO), PROBE)() == "torch"
        assert select("an_op", (ONE, TWO), PROBE)() == "torch"
    assert [r.getMessage() for r in caplog.records] == ["an_op on cpu: torch (not triton: no GPU here)"]


def test_a_named_back_end_that_cannot_serve_is_an_error(monkeypatch):
    monkeypatch.setenv("FVLM_KERNELS", "triton")
    with pytest.raises(RuntimeError, match="no GPU here"):
        select("an_op", (ONE, TWO), PROBE)
    monkeypatch.setenv("FVLM_KERNELS", "flash_attn")
    with pytest.raises(RuntimeError, match="no such back end"):
        select("an_op", (ONE, TWO), PROBE)
    monkeypatch.setenv("FVLM_KERNELS", "fastest")
    with pytest.raises(ValueError, match="FVLM_KERNELS='fastest'"):
        select("an_op", (ONE, TWO), PROBE)
