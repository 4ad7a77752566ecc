"""Preparation that is killed, runs out of room, or is started twice: it goes on after what it had finished."""

from __future__ import annotations

import errno
import itertools
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.output import explain
from data_prep.prepare import PrepareError, main, prepare
from data_prep.sources import FolderSource
from data_prep.unit import RECORDS
from tests.data_prep.runs import SETTINGS, contents, records, session, start, stills, wait_for

SHARDS = 40


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """A manifest, and what is made of it without disturbance."""
    folder = tmp_path_factory.mktemp("whole")
    manifest = stills(folder, 3 * SHARDS, side=500)
    prepare(FolderSource(folder, manifest), folder / "out", **SETTINGS, workers=0)
    assert len(records(folder / "out")) == SHARDS
    return manifest, contents(folder / "out")


def half_written(out: Path) -> list[Path]:
    return [*out.glob(".*.tmp"), *(out / RECORDS).glob(".*")]


def last_worker(pid: int) -> int:
    """Of the run that `pid` is; itself, the resource tracker and the process that forks came before it."""
    found = session(pid)
    assert len(found) == 5
    return max(found)


@pytest.mark.slow  # below: at every step of every file
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_and_run_again(whole, tmp_path, seed):
    manifest, expected = whole
    rng, finished = random.Random(seed), {}
    for kill in range(2):
        goal = len(finished) + rng.randint(1, 7)
        with start(manifest, tmp_path, "--workers=2") as process:
            wait_for(lambda goal=goal: len(records(tmp_path)) >= goal or process.poll() is not None)
            time.sleep(rng.random() / 20)
            if kill % 2:
                os.killpg(process.pid, signal.SIGKILL)  # all at once
            else:
                process.kill()  # the first process, as for want of memory; the others are to end with it
        assert process.returncode == -signal.SIGKILL, "it was over before it was killed"
        wait_for(lambda pid=process.pid: not session(pid), seconds=5)
        finished = records(tmp_path) | finished  # of a shard that was made twice, the first record
        assert {name for name in contents(tmp_path) if name.startswith("shard-")} <= expected.keys()
    assert len(finished) < SHARDS
    (tmp_path / ".shard-000039.tar.elsewhere.123.tmp").write_bytes(b"left behind on another machine")
    with start(manifest, tmp_path, "--workers=2") as process:
        wait_for(lambda: len(records(tmp_path)) > len(finished) or process.poll() is not None)
        os.kill(last_worker(process.pid), signal.SIGKILL)  # that alone costs neither the run nor a clip
        _, told = process.communicate()
    assert process.returncode == 0, told
    assert contents(tmp_path) == expected
    assert finished.items() <= records(tmp_path).items()  # none was made again
    assert f"{SHARDS - len(finished)} shards made, {len(finished)} finished before; " in told


def test_killed_at_every_step_of_every_file(tmp_path):
    """Request; index, shard and record of two shards; summary: before each is on disk, is renamed, and after."""
    source = FolderSource(None, stills(tmp_path, 6))
    prepare(source, tmp_path / "whole", **SETTINGS, workers=0)
    expected = contents(tmp_path / "whole")
    fork = multiprocessing.get_context("fork")

    def killed(out: Path, step: int) -> None:
        calls = itertools.count()

        def deadly(function: Callable, after: bool = False) -> Callable:
            def call(*arguments) -> None:
                if not after and next(calls) == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                function(*arguments)
                if after and next(calls) == step:
                    os.kill(os.getpid(), signal.SIGKILL)

            return call

        os.fsync, os.replace = deadly(os.fsync), deadly(deadly(os.replace), after=True)
        prepare(source, out, **SETTINGS, workers=0)

    for step in range(3 * 8 + 1):
        out = tmp_path / f"{step}"
        process = fork.Process(target=killed, args=(out, step))
        process.start()
        process.join(60)
        assert process.exitcode == (-signal.SIGKILL if step < 3 * 8 else 0)
        finished = records(out)
        final = {name: content for name, content in contents(out).items() if not re.search(r"\.tmp$|lock$", name)}
        assert final.items() <= expected.items()
        prepare(source, out, **SETTINGS, workers=0)
        assert contents(out) == expected
        assert finished.items() <= records(out).items()


@pytest.mark.slow
def test_killed_while_it_starts(whole, tmp_path):
    manifest, expected = whole
    for delay in (0.2, 2.0):
        with start(manifest, tmp_path, "--workers=2") as process:
            time.sleep(delay)
            process.kill()
    with start(manifest, tmp_path, "--workers=2") as process:
        _, told = process.communicate()
    assert process.returncode == 0, told
    assert contents(tmp_path) == expected


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_interrupted(whole, tmp_path, number):
    manifest, expected = whole
    with start(manifest, tmp_path, "--workers=2") as process:
        wait_for(lambda: records(tmp_path))
        os.killpg(process.pid, number)
        _, told = process.communicate(timeout=30)
    assert process.returncode == 75, told
    assert told.endswith("interrupted; run again to go on\n")
    assert "Traceback" not in told
    assert not half_written(tmp_path)
    made = {name: content for name, content in contents(tmp_path).items() if name.endswith(".tar")}
    assert made.items() <= expected.items()


def test_two_runs_into_one_folder(whole, tmp_path, capsys):
    manifest, expected = whole
    with start(manifest, tmp_path, "--workers=1") as first:
        wait_for(lambda: records(tmp_path))
        with pytest.raises(PrepareError, match=rf"another run is at work there \(process {first.pid} on .*--out"):
            prepare(FolderSource(None, manifest), tmp_path, **SETTINGS, workers=0)
        assert main([f"--manifest={manifest}", f"--out={tmp_path}", "--size=56", "--samples-per-shard=3"]) == 1
        assert "error: " in capsys.readouterr().err
        assert first.poll() is None, "it was over before the second began"
        _, told = first.communicate()
    assert first.returncode == 0, told
    assert contents(tmp_path) == expected


@pytest.mark.slow
def test_a_full_disk(whole, tmp_path):
    """On a file system that is too small, then made larger."""
    manifest, expected = whole
    size = sum(path.stat().st_size for path in (manifest.parent / "out").rglob("*"))
    out = tmp_path / "out"
    out.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size // 2}", "tmpfs", str(out)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a file system of a given size needs root; the next test does without one")
    try:
        with start(manifest, out, "--workers=2") as process:
            _, told = process.communicate()
        assert process.returncode == 1
        assert "error: the disk is full: [Errno 28] No space left on device: " in told
        assert f"MiB are free in {out}" in told
        assert "run the same command again" in told
        assert "Traceback" not in told
        assert not half_written(out)
        finished = records(out)
        assert 0 < len(finished) < SHARDS
        made = {name: content for name, content in contents(out).items() if name.endswith((".tar", ".json"))}
        assert made.items() <= expected.items()
        subprocess.run(["mount", "-o", f"remount,size={8 * size}", str(out)], check=True)
        with start(manifest, out, "--workers=2") as process:
            _, told = process.communicate()
        assert process.returncode == 0, told
        assert contents(out) == expected
        assert finished.items() <= records(out).items()
    finally:
        subprocess.run(["umount", str(out)], check=True)


def test_no_room_for_any_one_of_the_files(tmp_path, monkeypatch):
    """The request, index, shard and record of two shards, the summary."""
    source = FolderSource(None, stills(tmp_path, 6))
    prepare(source, tmp_path / "whole", **SETTINGS, workers=0)
    expected, fsync = contents(tmp_path / "whole"), os.fsync
    for number in range(1, 9):
        written, out = [], tmp_path / f"{number}"

        def full(descriptor: int, written=written, number=number) -> None:
            written.append(descriptor)
            if len(written) == number:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left on device"):
            prepare(source, out, **SETTINGS, workers=0)
        assert not half_written(out)
        before = contents(out)
        assert before.items() <= (expected | {".prepare/lock": before[".prepare/lock"]}).items()
        prepare(source, out, **SETTINGS, workers=0)
        assert contents(out) == expected
        again = {1: 0, 8: 0}.get(number, (number - 2) % 3)  # files of the shard that was in work, no others
        assert len(written) == 8 + 1 + again


def test_what_is_said_of_a_full_disk(tmp_path):
    def said(filename: str | None, number: int = errno.ENOSPC) -> str:
        return explain(OSError(number, os.strerror(number), filename), tmp_path)

    assert f"MiB are free in {tmp_path}. " in said(None)
    assert f"MiB are free in {tmp_path}. " in said(str(tmp_path / "not" / "there" / "a.tar"))
    assert said("a.tar", errno.EDQUOT).startswith("the disk is full: ")
    assert said("a.tar", errno.EACCES) == "[Errno 13] Permission denied: 'a.tar'"
