"""Command: compile every kernel for GPU architectures without a GPU, and record registers, spills, shared memory."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.util import find_spec
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from benchmarks.environment import RESULTS, ROOT, fail, markdown_table, record, write_json
from benchmarks.workload import HostCall
from benchmarks.workloads import host_calls
from fvlm.kernels.dispatch import OPS
from fvlm.kernels.launching import Launch, Recording, Tiles, forced, recording

DESCRIPTION = """Compile every kernel, with every candidate tile, for GPU architectures; no GPU is needed.

The kernels' own host functions are called with tensors that have no memory; their launches are recorded and compiled
as Triton's launcher would compile them: the same types, constants and alignment. Exit code 1 if anything spills
registers or needs more shared memory than a block may have.

examples:
  python -m benchmarks.kernels_compile
  python -m benchmarks.kernels_compile --arch 90 --op query_attention --default-only
"""
META = torch.device("meta")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SHARED_LIMITS = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
"""Most shared memory of a block, in bytes (CUDA C++ Programming Guide, compute capabilities)."""


class Job(NamedTuple):
    """One kernel to compile, named so that any process can record its launch again."""

    op: str
    call: int
    """Which of the op's host calls."""
    geometry: str
    dtype: str
    kernel: str
    launch: int
    """Which of the call's launches of that kernel."""
    tiles: Tiles
    arch: int


class Compiled(NamedTuple):
    """What the compiler says of one kernel."""

    registers: int
    """A thread."""
    spilled: int
    """Bytes of stack and local memory a thread."""
    shared: int
    """Bytes of static and dynamic shared memory a block."""


def kernel_name(launch: Launch) -> str:
    """As in ``CANDIDATES`` and the tuned tables."""
    return launch.kernel.__name__.removesuffix("_kernel")


def arguments_of(launch: Launch, arch: int) -> tuple[Any, dict[str, str], dict, dict]:
    """What Triton's launcher would compile this launch with, for ``sm_<arch>``.

    Returns:
        options, signature (argument → type or ``constexpr``), constants and attributes by position: Triton's own
        launcher derives them here, so integers equal to 1 are constants and multiples of 16 are marked as such.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget("cuda", arch, 32))
    given = {**launch.arguments, **launch.tiles.blocks}
    given |= {"num_warps": launch.tiles.num_warps, "num_stages": launch.tiles.num_stages}
    bind = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    bound, specialization, options = bind(**given)
    return launch.kernel._pack_args(backend, given, bound, specialization, options)


def compile_launch(launch: Launch, arch: int) -> Compiled:
    """Compile one launch for ``sm_<arch>``.

    Triton keeps the binary in its cache, where a launch on a GPU of this architecture finds it.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options, signature, constants, attributes = arguments_of(launch, arch)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options.__dict__)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage did not say what {launch.kernel.__name__} uses: {usage!r}")
    registers, stack, static, local = map(int, found.groups())
    return Compiled(registers, stack + local, static + binary.metadata.shared)


def launches(call: HostCall) -> Recording:
    """What a forward and a backward pass would start."""
    with recording() as recorded:
        call.backward(call.forward())
    return recorded


def jobs(ops: Sequence[str], dtypes: Sequence[str], archs: Sequence[int], default_only: bool) -> list[Job]:
    """Everything there is to compile, once: every candidate that a tuned table may name, and every default.

    A kernel that has nothing to choose is compiled with the tiles it is started with.
    """
    found, seen, tunable = [], set(), set()
    for op, dtype in product(ops, dtypes):
        for geometry, call in enumerate(host_calls(op, DTYPES[dtype], META)):
            count = Counter()
            recorded = launches(call)
            for launch in recorded:
                name = kernel_name(launch)
                index, count[name] = count[name], count[name] + 1
                _, *compiled_with = arguments_of(launch, archs[0])
                if (name, repr(compiled_with)) in seen:
                    continue
                seen.add((name, repr(compiled_with)))
                variant, candidates = recorded.choices.get(name, ("", [launch.tiles]))
                if call.trained:
                    tunable.add((name, variant))
                every = (name, variant) in tunable and not default_only
                for tiles in candidates[: None if every else 1]:
                    found += [Job(op, geometry, call.geometry, dtype, name, index, tiles, arch) for arch in archs]
    return found


def run(job: Job) -> Compiled:
    """Compile one job, in whatever process."""
    call = host_calls(job.op, DTYPES[job.dtype], META)[job.call]
    with forced(job.kernel, job.tiles):
        recorded = launches(call)
    return compile_launch([each for each in recorded if kernel_name(each) == job.kernel][job.launch], job.arch)


def compile_all(todo: Sequence[Job], processes: int) -> list[tuple[Job, Compiled]]:
    """Compile in parallel processes, with a progress bar.

    Raises:
        RuntimeError: something does not compile; the message says what.
    """
    results: dict[int, Compiled] = {}
    with (
        ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool,
        tqdm(total=len(todo), unit="kernel", desc="compile", file=sys.stderr) as bar,
    ):
        waiting = {pool.submit(run, job): index for index, job in enumerate(todo)}
        for done in as_completed(waiting):
            index = waiting[done]
            if error := done.exception():
                pool.shutdown(cancel_futures=True)
                raise RuntimeError(f"{name(todo[index])} does not compile: {error}") from error
            results[index] = done.result()
            bar.update()
    return [(job, results[index]) for index, job in enumerate(todo)]


def name(job: Job) -> str:
    """As rows and figures are named."""
    return f"{job.kernel}, {job.dtype}, {job.geometry}, {tiles_name(job.tiles)}, sm_{job.arch}"


def tiles_name(tiles: Tiles) -> str:
    """Such as ``BLOCK_N=64 4 warps 2 stages``."""
    blocks = [f"{block}={size}" for block, size in tiles.blocks.items()]
    return " ".join([*blocks, f"{tiles.num_warps} warps", f"{tiles.num_stages} stages"])


def table(results: list[tuple[Job, Compiled]]) -> str:
    """A row for each kernel and tile, a column for each architecture."""
    rows: dict[str, dict[str, str]] = {}
    for job, found in results:
        first = {"kernel": f"{job.kernel}, {job.dtype}", "shape": job.geometry, "tiles": tiles_name(job.tiles)}
        row = rows.setdefault(repr(first), first)
        spilled = f" **{found.spilled} spilled**" if found.spilled else ""
        row[f"sm_{job.arch}: registers, shared KB"] = f"{found.registers}, {found.shared / 1024:.1f}{spilled}"
    return markdown_table(list(rows.values()))


def faults(results: list[tuple[Job, Compiled]]) -> list[str]:
    """What spills, and what no block of its architecture could hold."""
    found = [f"{name(job)}: {each.spilled} bytes spilled" for job, each in results if each.spilled]
    for job, each in results:
        limit = SHARED_LIMITS[job.arch]
        if each.shared > limit:
            found.append(f"{name(job)}: {each.shared} bytes of shared memory, a block may have {limit}")
    return found


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels_compile",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    archs, default_json = (80, 90, 120), RESULTS / "kernels_compile.json"
    parser.add_argument("--arch", type=int, nargs="+", choices=SHARED_LIMITS, default=archs, help="default 80 90 120")
    parser.add_argument("--op", nargs="+", choices=OPS, default=OPS, help="default all")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="default bf16 fp32")
    parser.add_argument("--default-only", action="store_true", help="the first candidate of each kernel alone")
    parser.add_argument("--processes", type=int, default=2, help="that compile at the same time (default 2)")
    parser.add_argument("--json", type=Path, default=default_json, help=f"default {default_json.relative_to(ROOT)}")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 all is well, 1 something spills, does not fit or cannot be compiled, 2 wrong usage."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    asked = parse(arguments)
    if find_spec("triton") is None:
        return fail("Triton is not installed (pip install 'fvlm[gpu]')")
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return fail("TRITON_INTERPRET is set: its kernels cannot be compiled; unset it for this command")
    todo = jobs(asked.op, asked.dtype, asked.arch, asked.default_only)
    try:
        results = compile_all(todo, asked.processes)
    except RuntimeError as error:
        return fail(str(error))
    figures = {f"{name(job)}/{key}": value for job, each in results for key, value in each._asdict().items()}
    write_json(asked.json, record("benchmarks.kernels_compile", arguments, figures))
    print(table(results))
    wrong = faults(results)
    print(f"\n{len(results)} compiled, {len(wrong)} with faults; written to {asked.json}")
    return fail("\n".join(wrong)) if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
