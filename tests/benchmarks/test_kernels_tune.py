"""The search for tiles, and the table it leaves for the kernels."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.environment import record, write_json
from benchmarks.kernels import main
from benchmarks.kernels_tune import Tried, merged, winners
from fvlm.kernels import launching
from fvlm.kernels.launching import Tiles, choose

SMALL, LARGE, WIDE = (Tiles({"BLOCK_N": size}, warps, 2) for size, warps in ((32, 4), (64, 4), (64, 8)))


def tried(geometry, *milliseconds):
    """One kernel's candidates on one geometry."""
    return [
        Tried("op_fwd", "bfloat16 k=64", geometry, tiles, ms)
        for tiles, ms in zip((SMALL, LARGE, WIDE), milliseconds, strict=True)
    ]


def test_the_fastest_tiles_win():
    assert winners(tried("a", 3.0, 2.0, 4.0)) == {"op_fwd": {"bfloat16 k=64": LARGE}}


def test_a_variant_of_several_geometries_is_decided_by_all_of_them_alike():
    """However long each takes: what wins 10 % of a short pass and loses 30 % of a long one does not win."""
    assert winners([*tried("short", 1.0, 0.9, 2.0), *tried("long", 1000.0, 1300.0, 2000.0)])["op_fwd"] == {
        "bfloat16 k=64": SMALL
    }
    assert winners([*tried("short", 1.0, 0.5, 2.0), *tried("long", 1000.0, 1300.0, 2000.0)])["op_fwd"] == {
        "bfloat16 k=64": LARGE
    }


def test_tiles_with_a_wrong_result_on_one_geometry_do_not_win():
    assert winners([*tried("a", 3.0, 1.0, 2.0), *tried("b", 3.0, None, 2.0)])["op_fwd"] == {"bfloat16 k=64": WIDE}


@pytest.fixture
def table_of_a_gpu(tmp_path, monkeypatch):
    """A tuned table as the command writes it, for the GPU that tensors are made to seem to be on."""
    file = tmp_path / "test-gpu.json"
    tiles = merged(file, winners(tried("a", 2.0, 2.0, 1.0)))
    write_json(file, record("benchmarks.kernels", ["--tune"], {}, tiles=tiles))
    monkeypatch.setattr(launching, "TUNED", tmp_path)
    monkeypatch.setattr(launching, "_gpu", lambda device: "test-gpu")
    launching._tuned.cache_clear()
    yield file
    launching._tuned.cache_clear()


def test_kernels_find_the_tuned_tiles_of_their_variant(table_of_a_gpu):
    probe = torch.zeros(1, dtype=torch.bfloat16)
    candidates = {2: [SMALL, LARGE, WIDE]}
    assert choose("op_fwd", launching.variant(probe, k=64), candidates, probe) == WIDE
    assert choose("op_fwd", launching.variant(probe, k=128), candidates, probe) == SMALL
    assert choose("op_bwd", launching.variant(probe, k=64), candidates, probe) == SMALL


def test_a_later_search_keeps_what_it_did_not_search(table_of_a_gpu):
    table = merged(table_of_a_gpu, {"op_fwd": {"bfloat16 k=16": SMALL}, "op_bwd": {"bfloat16 k=64": LARGE}})
    assert table == {
        "op_fwd": {"bfloat16 k=64": WIDE._asdict(), "bfloat16 k=16": SMALL._asdict()},
        "op_bwd": {"bfloat16 k=64": LARGE._asdict()},
    }


@pytest.mark.slow
def test_rehearsed_search_writes_a_table_of_candidates(tmp_path, monkeypatch, capsys):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    file = tmp_path / "tuned.json"
    assert main(["--rehearse", "--tune", "--op", "query_attention", "--json", str(file)]) == 0
    from fvlm.kernels.query_attention.kernel import CANDIDATES

    contents = json.loads(file.read_text())
    assert contents["rehearsal"] is True
    assert set(contents["tiles"]) == set(CANDIDATES)
    for kernel, variants in contents["tiles"].items():
        assert set(variants) == {"bfloat16 k=16 m=16"}
        assert all(Tiles(**tiles) in CANDIDATES[kernel][2] for tiles in variants.values())
        searched = [name for name in contents["figures"] if name.startswith(f"{kernel},")]
        assert len(searched) == 2 * len(CANDIDATES[kernel][2])  # two shapes
    assert "times mean nothing" in capsys.readouterr().out
