"""Who serves a call, and what happens when nobody can."""

from __future__ import annotations

import logging

import pytest
import torch

from fvlm.kernels import dispatch
from fvlm.kernels.dispatch import Backend, select

ONE = Backend("triton", lambda: "triton", lambda probe, named: None if named else "only by name")
TWO = Backend("torch", lambda: "torch")
THREE = Backend("flash_attn", lambda: "flash_attn", lambda probe, named: "no GPU here")
PROBE = torch.zeros(1)
OP = "varlen_attention"


def test_auto_takes_the_first_that_can_and_says_so_once(monkeypatch, caplog):
    monkeypatch.delenv("FVLM_KERNELS", raising=False)
    monkeypatch.setattr(dispatch, "_logged", set())
    with caplog.at_level(logging.INFO):
        assert select(OP, (ONE, TWO), PROBE)() == "torch"
        assert select(OP, (ONE, TWO), PROBE)() == "torch"
    assert [r.getMessage() for r in caplog.records] == [
        "varlen_attention, float32 on cpu: torch (not triton: only by name)"
    ]


def test_a_named_back_end_that_cannot_serve_is_an_error(monkeypatch):
    monkeypatch.setenv("FVLM_KERNELS", "triton")
    assert select(OP, (ONE, TWO), PROBE)() == "triton"
    monkeypatch.setenv("FVLM_KERNELS", "flash_attn")
    with pytest.raises(RuntimeError, match="no GPU here"):
        select(OP, (ONE, TWO, THREE), PROBE)
    with pytest.raises(RuntimeError, match="has no back end flash_attn"):
        select(OP, (ONE, TWO), PROBE)


@pytest.mark.parametrize("setting", ["torch,varlen_attention:triton", "varlen_attention:triton,torch"])
def test_a_back_end_can_be_named_for_one_op(setting, monkeypatch):
    monkeypatch.setenv("FVLM_KERNELS", setting)
    assert select(OP, (ONE, TWO), PROBE)() == "triton"
    assert select("query_attention", (ONE, TWO), PROBE)() == "torch"


@pytest.mark.parametrize("setting", ["fastest", "attention:torch", "torch,", ":fast"])
def test_an_unknown_name_is_an_error_that_lists_the_known_ones(setting, monkeypatch):
    monkeypatch.setenv("FVLM_KERNELS", setting)
    with pytest.raises(ValueError, match=r"FVLM_KERNELS=.*expected auto or one of triton, flash_attn"):
        select(OP, (ONE, TWO), PROBE)


def test_nobody_left_is_an_error_with_every_reason(monkeypatch):
    monkeypatch.setenv("FVLM_KERNELS", "auto")
    with pytest.raises(RuntimeError, match=r"not triton: only by name; not flash_attn: no GPU here"):
        select(OP, (ONE, THREE), PROBE)
