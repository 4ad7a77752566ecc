"""Kernels compiled ahead of time for a GPU that is not there, and the argument types they are compiled with."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from benchmarks import kernels_compile
from benchmarks.kernels_compile import Compiled, Job, faults, main, table
from fvlm.kernels.dispatch import OPS
from fvlm.kernels.launching import Tiles

pytest.importorskip("triton")

TOY = """
import json

import torch
import triton
import triton.language as tl

from benchmarks.kernels_compile import arguments_of, compile_launch
from fvlm.kernels.launching import Launch, Tiles, launch, recording


@triton.jit
def toy_kernel(
    pointer, indices, one, sixteenfold, odd, wide, scale, flag, nothing, N: tl.constexpr, BLOCK: tl.constexpr
):
    i = tl.arange(0, BLOCK)
    tl.store(pointer + i * odd, tl.load(indices + i * sixteenfold + wide) * scale * N)


meta = torch.device("meta")
with recording() as recorded:
    launch(
        toy_kernel, 7, Tiles({"BLOCK": 64}, 8, 1), pointer=torch.empty(9, dtype=torch.bfloat16, device=meta),
        indices=torch.empty(9, dtype=torch.int32, device=meta), one=1, sixteenfold=48, odd=49, wide=2**33 + 1,
        scale=1.0, flag=True, nothing=None, N=16,
    )
options, signature, constants, attributes = arguments_of(recorded[0], 90)
print(json.dumps({
    "signature": signature, "constants": [[*key, value] for key, value in constants.items()],
    "attributes": [[*key, value] for key, value in attributes.items()],
    "options": [options.num_warps, options.num_stages, options.arch], "compiled": compile_launch(recorded[0], 90),
}))
"""


def compiler_environment():
    """The environment in which Triton compiles instead of interpreting."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


@pytest.fixture(scope="module")
def toy(tmp_path_factory, repo_root):
    file = tmp_path_factory.mktemp("toy") / "toy.py"
    file.write_text(TOY)
    environment = compiler_environment() | {"PYTHONPATH": str(repo_root)}
    out = subprocess.run([sys.executable, file], env=environment, capture_output=True, text=True, check=True).stdout
    return json.loads(out)


def test_types_are_what_tritons_launcher_gives(toy):
    """Numbers as the launcher passes them: 1, None, booleans' kin and ``constexpr`` parameters shape the code."""
    assert toy["signature"] == {
        "pointer": "*bf16",
        "indices": "*i32",
        "one": "constexpr",
        "sixteenfold": "i32",
        "odd": "i32",
        "wide": "i64",
        "scale": "fp32",
        "flag": "u1",
        "nothing": "constexpr",
        "N": "constexpr",
        "BLOCK": "constexpr",
    }
    assert toy["constants"] == [[2, 1], [8, None], [9, 16], [10, 64]]


def test_multiples_of_sixteen_and_pointers_are_marked(toy):
    divisible = [["tt.divisibility", 16]]
    marked = [entry[0] for entry in toy["attributes"] if entry[1] == divisible]
    assert marked == [0, 1, 3]
    assert [entry for entry in toy["attributes"] if entry[1] and entry[1] != divisible] == []


def test_warps_stages_and_architecture_reach_the_compiler(toy):
    assert toy["options"] == [8, 1, "sm90"]
    registers, spilled, shared = toy["compiled"]
    assert 0 < registers <= 255
    assert (spilled, shared) == (0, 0)


def test_default_tiles_of_every_kernel_compile_without_spilling(repo_root, tmp_path):
    command = ["-m", "benchmarks.kernels_compile", "--arch", "90", "--dtype", "bf16", "--default-only"]
    file = tmp_path / "compiled.json"
    done = subprocess.run(
        [sys.executable, *command, "--json", file],
        cwd=repo_root,
        env=compiler_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    contents = json.loads(file.read_text())
    assert contents["command"] == " ".join(["python", *command, "--json", str(file)])
    assert {"commit", "versions", "hardware", "date"} <= set(contents)
    figures = contents["figures"]
    assert {op for op in OPS if any(name.startswith(op) for name in figures)} == set(OPS)
    spilled = {name: value for name, value in figures.items() if name.endswith("/spilled")}
    assert len(spilled) * 3 == len(figures)
    assert set(spilled.values()) == {0}
    assert all(0 < value <= 255 for name, value in figures.items() if name.endswith("/registers"))


JOB = Job("op", 0, "some shape", "bf16", "op_fwd", 0, Tiles({"BLOCK_N": 64}, 4, 2), 120)


def test_spills_and_blocks_too_big_for_the_architecture_are_faults():
    smaller = JOB._replace(arch=90)
    fine = [(JOB, Compiled(255, 0, 99 * 1024)), (smaller, Compiled(255, 0, 227 * 1024))]
    assert faults(fine) == []
    assert ["spilled" in fault for fault in faults([(JOB, Compiled(255, 8, 0))])] == [True]
    [fault] = faults([(JOB, Compiled(64, 0, 100 * 1024)), (smaller, Compiled(64, 0, 100 * 1024))])
    assert "sm_120" in fault
    assert "shared" in fault


def test_one_row_a_kernel_and_one_column_an_architecture():
    lines = table([(JOB, Compiled(64, 8, 2048)), (JOB._replace(arch=90), Compiled(65, 0, 1024))]).splitlines()
    assert len(lines) == 3
    assert "64, 2.0 **8 spilled** | 65, 1.0" in lines[-1]


@pytest.mark.parametrize(("spilled", "code"), [(0, 0), (8, 1)])
def test_exit_code_says_whether_anything_spills(spilled, code, monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(kernels_compile, "jobs", lambda *_: [JOB])
    monkeypatch.setattr(kernels_compile, "compile_all", lambda *_: [(JOB, Compiled(64, spilled, 0))])
    assert main(["--json", str(tmp_path / "file.json")]) == code
    figures = json.loads((tmp_path / "file.json").read_text())["figures"]
    assert figures[f"{kernels_compile.name(JOB)}/spilled"] == spilled
    assert ("8 bytes spilled" in capsys.readouterr().err) == bool(code)


def test_the_interpreters_kernels_are_not_compiled(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["--json", str(tmp_path / "file.json")]) == 1
    assert "unset" in capsys.readouterr().err
    assert not (tmp_path / "file.json").exists()
