"""The executor for Ray clusters: what local processes make, however tasks, nodes and drivers end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("ray")
os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}  # a token would be kept in the home folder

import ray
from ray.cluster_utils import Cluster

from data_prep.executor_ray import _remote, run_on_ray
from data_prep.prepare import main, prepare
from data_prep.sources import FolderSource, Row
from data_prep.unit import RECORDS, Job, Unit, units
from tests.data_prep.runs import ROOT, SETTINGS, command, contents, records, start, stills, wait_for


@pytest.fixture(scope="module")
def cluster():
    """A cluster of one machine with two cores."""
    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    yield started
    started.shutdown()


def job_in(out: Path) -> Job:
    (out / RECORDS).mkdir(parents=True, exist_ok=True)
    return Job(out=out, size=56, max_frames=64, tokenizer="tiny", samples_per_shard=3)


def run(address: str, job: Job, files: list[str], work, workers: int | None = None) -> tuple[dict, int]:
    rows = (Row(f"k{i}", (file,)) for i, file in enumerate(files))
    seen, done = {}, []
    todo = units(rows, job.samples_per_shard)
    for _, record in run_on_ray(job, todo, address, workers, done.append, seconds_per_file=2.0, work=work):
        seen |= record
    return seen, sum(done)


def deadly():
    """Stands in for `write_unit`: some files are deadly. Made here so that it travels by value."""

    def work(job, unit, lost, report):
        read = {"skipped": []}
        for done, row in enumerate(unit.rows):
            [file] = row.media
            report(done, file)
            if file in lost:
                read[row.key] = lost[file]
            elif file.startswith("crash"):
                os._exit(11)
            elif file.startswith("hang"):
                re.match("(a+)+$", 40 * "a" + "b")  # for hours, and no other thread gets a turn
            elif file.startswith("full"):
                raise OSError(28, "No space left on device", "shard.tar")
            elif file.startswith("bug"):
                raise KeyError("a mistake in the code")
            else:
                read[row.key] = "read"
        return read

    return work


def test_the_same_bytes_as_locally(cluster, tmp_path, monkeypatch, capsys):
    stills(tmp_path, 11)
    monkeypatch.chdir(tmp_path)  # paths that are relative to where the run was started
    here = prepare(FolderSource(None, Path("rows.jsonl")), Path("here"), **SETTINGS, workers=0)
    asked = ["--manifest=rows.jsonl", "--out=ray", "--size=56", "--samples-per-shard=3", "--executor=ray"]
    assert main([*asked, f"--ray-address={cluster.address}"]) == 0
    assert contents(tmp_path / "ray") == contents(tmp_path / "here")
    assert (here["samples"], here["skipped"], here["shards"]) == (10, 1, 4)
    assert "4 shards made, 0 finished before; 11 rows" in capsys.readouterr().err


@pytest.mark.slow
def test_deadly_files_are_left_out_as_they_are_locally(cluster, tmp_path):
    files = ["a", "crash1", "b", "crash2", "crash3", "c", "d", "hang", "e", "f"]
    seen, done = run(cluster.address, job_in(tmp_path), files, deadly())
    special = {1: "decoder_crashed", 3: "decoder_crashed", 4: "decoder_crashed", 7: "decoder_timeout"}
    assert seen == {"skipped": []} | {f"k{i}": special.get(i, "read") for i in range(len(files))}
    assert done == len(files)
    assert not list((tmp_path / RECORDS).iterdir())  # no note stays behind


@pytest.mark.slow
def test_failures_that_are_not_a_files_fault(cluster, tmp_path):
    with pytest.raises(RuntimeError, match="a mistake in the code"):
        run(cluster.address, job_in(tmp_path), ["a", "bug"], deadly())
    with pytest.raises(OSError, match=r"No space left on device: 'shard\.tar'") as caught:
        run(cluster.address, job_in(tmp_path), ["a", "full"], deadly())
    assert caught.value.errno == 28

    def die(*_):
        os._exit(11)

    with pytest.raises(RuntimeError, match=r"shard 0: .* died 3 times while it read no file"):
        run(cluster.address, job_in(tmp_path), ["a"], die)


@pytest.mark.slow
def test_units_are_made_as_they_are_needed(cluster, tmp_path):
    taken = []

    def todo():
        for number in range(50):
            taken.append(number)
            yield Unit(number, (Row(f"k{number}", ("a",)),))

    finished = 0
    for _ in run_on_ray(job_in(tmp_path), todo(), cluster.address, 2, lambda rows: None, work=deadly()):
        finished += 1
        assert len(taken) <= finished + 2
    assert finished == 50


@pytest.mark.slow
def test_a_machine_that_does_not_see_the_files_ends_the_run(cluster, tmp_path):
    job, there = job_in(tmp_path), tmp_path / "there.png"
    there.write_bytes(b"x")

    def misses(job, unit, lost, report):
        unit.record(job).write_text("{}")
        return {"skipped": [{"key": "k0", "file": unit.rows[0].media[0], "reason": "missing_file", "detail": ""}]}

    with pytest.raises(FileNotFoundError, match=r"does not see it; every node needs .*there\.png"):
        run(cluster.address, job, [str(there)], misses)
    assert not list((tmp_path / RECORDS).iterdir())  # it is not taken for finished
    assert run(cluster.address, job, [str(tmp_path / "nowhere.png")], misses)[1] == 1
    unit = Unit(0, (Row("k0", ("a",)),))
    with pytest.raises(FileNotFoundError, match="does not see it; every node needs"):
        _remote._function(job, unit, {}, str(tmp_path / "no-note"), os.getcwd(), deadly())


def test_no_cluster_and_no_ray(tmp_path, monkeypatch, capsys):
    asked = ["--manifest", str(stills(tmp_path, 2)), "--out", str(tmp_path / "out"), "--size", "56"]
    assert main([*asked, "--executor", "ray", "--ray-address", "127.0.0.1:1"]) == 1
    assert "--ray-address 127.0.0.1:1: no Ray cluster there" in capsys.readouterr().err
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:2")
    assert main([*asked, "--executor", "ray"]) == 1
    assert "127.0.0.1:2: no Ray cluster there" in capsys.readouterr().err
    for wrong in (["--ray-address", "auto"], ["--executor", "ray", "--ray-address", "here"], ["--executor", "slurm"]):
        with pytest.raises(SystemExit) as caught:
            main([*asked, *wrong])
        assert caught.value.code == 2
    monkeypatch.delitem(sys.modules, "data_prep.executor_ray")
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main([*asked, "--executor", "ray"]) == 1
    assert "install Ray (pip install" in capsys.readouterr().err


@pytest.mark.slow
def test_a_lost_machine_costs_no_file(tmp_path):
    def slow(job, unit, lost, report):
        [row] = unit.rows
        report(0, row.media[0])
        (job.out / f"{unit.number}-{ray.get_runtime_context().get_node_id()}").touch()
        time.sleep(3)
        return {row.key: lost.get(row.media[0], "read"), "skipped": []}

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = {node.node_id: node for node in (cluster.add_node(num_cpus=1) for _ in range(2))}

    def lose() -> None:
        wait_for(lambda: list(tmp_path.glob("0-*")))
        [begun] = tmp_path.glob("0-*")
        cluster.remove_node(nodes[begun.name.removeprefix("0-")], allow_graceful=False)

    thread = threading.Thread(target=lose)
    thread.start()
    try:
        todo = (Unit(number, (Row(f"k{number}", (f"file{number}",)),)) for number in range(3))
        runs = run_on_ray(job_in(tmp_path), todo, cluster.address, 1, lambda rows: None, work=slow)
        seen = {name: value for _, record in runs for name, value in record.items()}
    finally:
        thread.join()
        cluster.shutdown()
    assert seen == {"k0": "read", "k1": "read", "k2": "read", "skipped": []}
    assert len(list(tmp_path.glob("0-*"))) == 2  # begun on both


@pytest.mark.slow
def test_a_killed_driver_and_another_run(cluster, tmp_path):
    manifest = stills(tmp_path, 90, side=700)
    prepare(FolderSource(tmp_path, manifest), tmp_path / "whole", **SETTINGS, workers=0)
    on_ray = ("--executor", "ray", "--ray-address", cluster.address)
    with start(manifest, tmp_path / "out", *on_ray) as process:
        wait_for(lambda: len(records(tmp_path / "out")) >= 3)
        process.kill()
    finished = records(tmp_path / "out")
    assert 3 <= len(finished) < 30
    done = subprocess.run(command(manifest, tmp_path / "out", *on_ray), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert finished.items() <= records(tmp_path / "out").items()


@pytest.mark.slow
def test_a_cluster_of_its_own_goes_with_the_run(tmp_path):
    manifest = stills(tmp_path, 60, side=700)
    prepare(FolderSource(tmp_path, manifest), tmp_path / "whole", **SETTINGS, workers=0)
    local = ("--executor", "ray", "--ray-address", "local", "--workers", "2")
    with start(manifest, tmp_path / "out", *local) as process:
        wait_for(lambda: records(tmp_path / "out"))
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=300)
    assert process.returncode == 75, told
    assert "interrupted; run again to go on" in told
    with start(manifest, tmp_path / "out", *local) as process:
        _, told = process.communicate(timeout=300)
    assert process.returncode == 0, told
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
