"""The script that a GPU is given: it goes through, goes on where it stopped, and says what failed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton")

PARTS = ["tests", "throughput-135m-stage2", "profile-135m", "throughput-1b7-stage2", "memory-1b7",
         "throughput-135m-dpo", "kernels-tune", "kernels", "budget-135m", "ladder-135m-stage2",
         "generation"]  # fmt: skip


def run_gpu(repo_root, out, *arguments, **environment):
    command = [repo_root / "benchmarks" / "run_gpu.sh", *arguments]
    settings = os.environ | {"OUT": str(out), "PYTHON": sys.executable} | environment
    return subprocess.run(command, cwd=out, env=settings, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_rehearsal_of_every_part_then_nothing_left_to_do(repo_root, tmp_path):
    listed = re.search(r"^PARTS=\((.*?)\)", (repo_root / "benchmarks" / "run_gpu.sh").read_text(), re.M | re.S)
    assert listed.group(1).split() == PARTS
    first = run_gpu(repo_root, tmp_path, "--rehearse")
    assert first.returncode == 0, first.stdout + first.stderr
    for part in PARTS:
        assert json.loads((tmp_path / f"{part}.json").read_text())["figures"]
        assert (tmp_path / f"{part}.txt").read_text()
    assert json.loads((tmp_path / "tests.json").read_text())["figures"]["passed"] > 0
    assert list(tmp_path.glob("*incomplete*")) == []
    second = run_gpu(repo_root, tmp_path, "--rehearse")
    assert second.returncode == 0
    assert second.stdout.count("skipped") == len(PARTS)
    assert "mean nothing" not in second.stdout


def test_a_part_that_is_there_is_skipped_and_one_that_fails_is_named(repo_root, tmp_path):
    """A stand-in for Python that cannot do anything: the first part fails, and so does the script."""
    (tmp_path / "kernels.json").write_text("{}")
    done = run_gpu(repo_root, tmp_path, "tests", "kernels", PYTHON="false")
    assert done.returncode == 1
    assert "failed: tests" in done.stderr
    assert "kernels: " in done.stdout
    assert "skipped" in done.stdout
    assert not (tmp_path / "tests.json").exists()


def test_a_part_that_takes_too_long_is_stopped_and_not_counted_as_done(repo_root, tmp_path):
    slow = tmp_path / "python"
    slow.write_text('#!/bin/sh\n[ "$1" != -m ] || sleep 30\n')
    slow.chmod(0o755)
    done = run_gpu(repo_root, tmp_path, "--rehearse", "kernels", PYTHON=str(slow), LIMIT="1")
    assert done.returncode == 1
    assert "failed: kernels" in done.stderr
    assert not (tmp_path / "kernels.json").exists()


def test_what_is_missing_is_named_and_parts_without_it_go_on(repo_root, tmp_path):
    """A stand-in for Python that lacks every package, on a machine that brought no wheels."""
    bare = tmp_path / "python"
    bare.write_text('#!/bin/sh\n[ "$1" = -m ] && { shift 3; echo "{}" >"$1"; exit 0; }\nexec python3 -S "$@"\n')
    bare.chmod(0o755)
    done = run_gpu(repo_root, tmp_path, "--rehearse", "kernels", PYTHON=str(bare), WHEELS=str(tmp_path / "none"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "missing here: deepspeed, webdataset" in done.stderr
    assert f"no wheels in {tmp_path / 'none'}: run benchmarks/gpu_wheels.sh where there is a network" in done.stderr
    assert (tmp_path / "kernels.json").exists()


def test_unknown_parts_are_wrong_usage(repo_root, tmp_path):
    done = run_gpu(repo_root, tmp_path, "kernel")
    assert done.returncode == 2
    assert "unknown part kernel" in done.stderr
