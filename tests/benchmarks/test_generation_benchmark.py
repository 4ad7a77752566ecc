"""The benchmark of autoregressive looking, end to end and tiny."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import generation
from fvlm.model import tiny_config

SCRIPT = Path(generation.__file__)


def test_it_reports_every_length_and_the_ratio(tmp_path):
    path = tmp_path / "result.json"
    given = ["--model", "tiny", "--lengths", "40", "80", "--batch", "2", "--frames", "3", "--runs", "2"]
    assert generation.main([*given, "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    figures = result["figures"]
    llm = tiny_config(512).llm_config
    width = llm.hidden_size // llm.num_attention_heads * llm.num_key_value_heads
    for length in (40, 80):  # keys and values in float32
        assert figures[f"cache_mib_{length}"] == pytest.approx(length * llm.num_hidden_layers * 2 * width * 4 / 2**20)
    assert all(figures[name] > 0 for name in ("ms_a_frame_40", "ms_a_frame_80", "batched_ratio", "peak_mib_80"))
    assert "python -m benchmarks.generation" in result["command"]


def test_it_starts_as_a_file_and_refuses_too_short_streams():
    run = subprocess.run([sys.executable, SCRIPT, "--lengths", "8"], capture_output=True, text=True)
    assert run.returncode == 2
    assert "--lengths 8" in run.stderr
