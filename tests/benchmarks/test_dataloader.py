"""The loader's benchmark: what it counts, and a tiny run of the command."""

from __future__ import annotations

import json
import sys
import time

import pytest

from benchmarks.dataloader import Comparison, main, parse, speedups
from benchmarks.dataloader_clock import measure
from benchmarks.dataloader_ours import FLAT, summary
from benchmarks.environment import processor_slug


def test_rates_count_what_comes_after_the_warm_up():
    given = iter([(4, 40), (4, 40), (3, 30), (3, 0), (5, 50), (9, 9)])

    def busy():
        for batch in given:
            until = time.process_time() + 0.03  # the system counts in hundredths
            while time.process_time() < until:
                pass
            yield batch

    found = measure(busy(), warm_up=5, samples=6, num_workers=0)
    assert next(given) == (5, 50)  # two batches of warm-up, two that count: 6 samples, 30 frames
    assert found["samples_per_s"] / found["batches_per_s"] == pytest.approx(3)
    assert found["frames_per_s"] / found["batches_per_s"] == pytest.approx(15)
    assert found["samples_per_core_s"] * found["cores_used"] == pytest.approx(found["samples_per_s"])
    assert 0 < found["own_mib"] <= found["resident_mib"]


def test_a_stream_that_is_too_short_is_an_error():
    with pytest.raises(ValueError, match="8 samples in all, expected 5 \\+ 6"):
        measure([(4, 0), (4, 0)], warm_up=5, samples=6, num_workers=0)


def test_speed_ups_are_by_round_and_the_headline_is_the_lowest(tmp_path):
    comparison = Comparison(tmp_path, 1000, None)
    for (loader, workers), rates in {
        ("ours", 0): (6.0, 8.0, 1.0),
        ("ours", 2): (4.0, 4.0, 4.0),
        ("webdataset", 0): (2.0, 4.0, 0.1),
        ("webdataset", 2): (2.0, 1.0, 2.0),
    }.items():
        comparison.found[loader, workers] = [{"samples_per_core_s": rate} for rate in rates]
    assert speedups(comparison.found["ours", 0], comparison.found["webdataset", 0]) == pytest.approx([3, 2, 10])
    figures = comparison.figures()
    assert figures["speedup_webdataset/workers=0"] == pytest.approx(3)
    assert figures["speedup_webdataset"] == figures["speedup_webdataset/workers=2"] == pytest.approx(2)
    assert figures["ours/workers=0/samples_per_core_s"] == 6


def test_memory_that_grows_is_not_flat():
    def looks(grown_by):  # 200 looks; the first quarter fills what is kept
        return [{"resident_mib": 100 + min(i, 50) + grown_by * i / 200, "own_mib": 9.0} for i in range(200)]

    assert summary(looks(0))["flat"]
    assert summary(looks(0))["resident_mib_most"] == 150
    assert not summary(looks(4))["flat"]
    assert summary(looks(4))["resident_mib_growth"] == pytest.approx(2 / 151.5, rel=0.05)
    assert summary(looks(4))["resident_mib_growth"] > FLAT


@pytest.mark.parametrize("arguments", [["--samples", "10"], ["--rounds", "0"], ["--soak", "8", "--workers", "1", "2"]])
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(arguments)
    assert stopped.value.code == 2
    assert "expected" in capsys.readouterr().err


@pytest.mark.slow
def test_a_tiny_run_compares_and_says_what_was_left_out(tmp_path, capfd):
    """Without MosaicML Streaming, which the test's own Python need not have."""
    no_streaming = tmp_path / "python"
    no_streaming.write_text("#!/bin/sh\necho \"No module named 'streaming'\" >&2; exit 1\n")
    no_streaming.chmod(0o755)
    file = tmp_path / "found.json"
    size = ["--samples", "512", "--size", "32", "--rounds", "1", "--workers", "0"]
    assert main([*size, "--rival-python", str(no_streaming), "--json", str(file)]) == 0
    contents = json.loads(file.read_text())
    for loader in ("ours", "webdataset"):
        assert contents["figures"][f"{loader}/workers=0/samples_per_core_s"] > 0
    assert contents["figures"]["speedup_webdataset"] > 0
    assert not any("streaming" in name for name in contents["figures"])
    assert "No module named 'streaming'" in contents["notes"][0]
    assert contents["set"]["samples"] == 512
    assert contents["rival_versions"]["webdataset"]["webdataset"]
    assert "as fast per core as webdataset (at least 3.0 asked)" in capfd.readouterr().out


def test_a_process_that_fails_ends_the_run_with_a_message(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert main(["--samples", "512", "--size", "32", "--soak", "4", "--json", str(tmp_path / "none.json")]) == 1
    assert "exit code 1, its message is above" in capfd.readouterr().err
    assert not (tmp_path / "none.json").exists()


@pytest.mark.slow
def test_a_short_soak_writes_its_memory(tmp_path):
    file = tmp_path / "soak.json"
    main(["--samples", "512", "--size", "32", "--soak", "4", "--workers", "1", "--json", str(file)])
    figures = json.loads(file.read_text())["figures"]
    assert (figures["packs"], figures["workers"]) == (4, 1)
    assert 0 < figures["own_mib_most"] < figures["resident_mib_most"] < 2048


def test_the_machine_has_a_file_name():
    assert all(character.isalnum() or character in "-." for character in processor_slug())
    assert processor_slug().endswith("-cores")
