"""Peak memory of training steps, by phase and component, beside what the planner predicts.

python -m benchmarks.memory --model 135m --ranks 2 --zero zero2 --checkpointing 1
python -m benchmarks.memory --model 1b7 --zero zero2_offload --tokens 8192 --frames 176 --checkpointing 1     (on a GPU)

Two steps of two worst-case packs on each rank, with random weights. On a GPU memory is the allocator's; on the CPU it
is what is alive (`fvlm.train.live_memory`), with the process's resident set beside it.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import socket
import sys
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing

from benchmarks.environment import RESULTS, fail, markdown_table, record, write_json
from fvlm.config import load_config
from fvlm.data.capacities import Capacities
from fvlm.model import build_model
from fvlm.model.configuration import PRESETS, preset_config
from fvlm.train.engine import Engine, World, start_ranks, stop_ranks
from fvlm.train.gpus import GIB
from fvlm.train.live_memory import LiveMemory
from fvlm.train.planner import predict
from fvlm.train.preflight import worst_case_pack
from fvlm.train.zero_config import read_zero_json
from fvlm.train_config import CheckpointingConfig

RATES = {"connector": 1e-6, "dino": 1e-6, "llm": 1e-6}
BESIDE = ("fragmentation", "CUDA context")
"""Components of a prediction that an allocator's own figures do not hold."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=PRESETS, default="135m")
    parser.add_argument("--ranks", type=int, default=1, help="processes on this machine")
    parser.add_argument("--zero", default="zero2", help="DeepSpeed JSON, by name or path")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--tokens", type=int, default=512, help="rows of the pack, T")
    parser.add_argument("--frames", type=int, default=8, help="frames of the pack, F")
    parser.add_argument("--longest", type=int, help="rows of the longest sample; default a quarter of the pack's")
    parser.add_argument("--checkpointing", type=float, default=0.0, help="share of blocks that are recomputed, 0 to 1")
    parser.add_argument("--json", type=Path, help="result file; default benchmarks/results/memory-<what>.json")
    return parser.parse_args(arguments)


def capacities_of(args: argparse.Namespace) -> Capacities:
    """Of a pack of samples that are all as long as allowed, every frame looked at twice."""
    longest, visual = args.longest or args.tokens // 4, 2 * args.frames
    return Capacities(
        frames=args.frames, tokens=args.tokens, visual=visual, coarse=2 * visual, samples=-(-args.tokens // longest),
        labels=(args.tokens - visual) // 2, max_seqlen=longest,
    )  # fmt: skip


def resident(key: str) -> int:
    """`VmRSS` or `VmHWM` of this process, bytes."""
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))


class Gauge:
    """Largest memory of a phase: of the allocator on a GPU; of what is alive, and of the resident set, on a CPU."""

    def __init__(self, device: torch.device):
        self.device, self.live = device, LiveMemory("cpu")
        self.live.category = "activations"
        self.start_resident = resident("VmRSS")

    def count_what_is_there(self, model: torch.nn.Module) -> None:
        """Take everything that is alive into the count: weights, and the engine's tensors."""
        gc.collect()
        weights = {p.untyped_storage()._cdata for p in model.parameters()}
        for found in (x for x in gc.get_objects() if isinstance(x, torch.Tensor) and x.device.type == "cpu"):
            with self.live.within("weights" if found.untyped_storage()._cdata in weights else "engine"):
                self.live.count(found)

    def start(self) -> None:
        """A phase begins."""
        self.live.start_peak()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the high-water mark starts anew

    def read(self) -> dict[str, float]:
        """Largest bytes since `start`."""
        if self.device.type == "cuda":
            return {
                "peak": torch.cuda.max_memory_allocated(self.device),
                "reserved": torch.cuda.max_memory_reserved(self.device),
            }
        return {
            "peak": self.live.peak.total(),
            "alive after": self.live.live.total(),
            "resident": resident("VmHWM") - self.start_resident,
        }


def measure(world: World, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Phase of the second step, when everything has been allocated → bytes."""
    train = load_config("tiny_test").train
    shares = CheckpointingConfig(encoder=args.checkpointing, llm=args.checkpointing)
    train = replace(train, packs_per_step=2 * world.size, dtype=args.dtype or "auto", activation_checkpointing=shares)
    gauge = Gauge(world.device)
    torch.manual_seed(0)
    model = build_model(preset_config(args.model)).train()
    batch = worst_case_pack(model.config, capacities_of(args)).to(world.device)
    engine = Engine(model, train, *read_zero_json(args.zero), world)
    gauge.count_what_is_there(engine.module)
    phases: dict[str, dict[str, float]] = {}
    with gauge.live:
        for step in range(2):
            for _ in range(engine.accumulation):  # the second time, the first's gradients are there
                gauge.start()
                out = engine.forward(batch=batch)
                phases["forward"] = gauge.read()
                gauge.start()
                engine.backward(out.loss_sum, 2 * int(out.num_labels) * world.size)
                del out
                phases["backward"] = gauge.read()
            gauge.start()
            engine.step(RATES)
            phases["step"] = gauge.read()
            if world.is_main:
                print(f"step {step + 1} of 2 done", file=sys.stderr, flush=True)
    return phases


def _rank(rank: int, args: argparse.Namespace, port: int, results: Any) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": args.ranks, "LOCAL_WORLD_SIZE": args.ranks}
    os.environ |= {name: str(value) for name, value in names.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.disable(logging.WARNING)
    world = start_ranks()
    phases = measure(world, args)
    if world.is_main:
        results.put(phases)
    stop_ranks()


def main() -> int:
    """Measure on ranks of our own, predict, print, write."""
    args = parse()
    warnings.filterwarnings("ignore", category=FutureWarning)
    on_gpu = torch.cuda.is_available()
    dtype = args.dtype or ("bf16" if on_gpu else "fp32")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    results = multiprocessing.get_context("spawn").SimpleQueue()
    try:
        multiprocessing.spawn(_rank, (args, port, results), nprocs=args.ranks)
    except multiprocessing.ProcessRaisedException as error:
        return fail(str(error).splitlines()[-1])
    phases = results.get()
    shares, capacities = CheckpointingConfig(encoder=args.checkpointing, llm=args.checkpointing), capacities_of(args)
    predicted = predict(
        preset_config(args.model), capacities, read_zero_json(args.zero)[0], args.ranks, dtype=dtype,
        checkpointing=shares, backend="triton" if on_gpu else "torch",
    )  # fmt: skip
    whole = sum(size for name, size in predicted.items() if name not in BESIDE)
    peak = max(phase["peak"] for phase in phases.values())
    rows = [{"phase": name} | {k: f"{v / GIB:.3f}" for k, v in phase.items()} for name, phase in phases.items()]
    print(f"{markdown_table(rows)}\n\npredicted, GiB: " + ", ".join(f"{k} {v / GIB:.3f}" for k, v in predicted.items()))
    print(f"peak {peak / GIB:.3f} GiB, predicted {whole / GIB:.3f} GiB: {whole / peak - 1:+.1%}")
    figures = {
        "peak_gib": peak / GIB,
        "predicted_gib": whole / GIB,
        "predicted_over_measured": whole / peak,
        **{
            f"{name}_{key.replace(' ', '_')}_gib": v / GIB for name, phase in phases.items() for key, v in phase.items()
        },
        **{f"predicted_{name.replace(' ', '_')}_gib": size / GIB for name, size in predicted.items()},
    }
    what = f"{args.model}-{args.zero}-{args.ranks}ranks-{dtype}-recompute{args.checkpointing:g}"
    path = args.json or RESULTS / f"memory-{what}-{'gpu' if on_gpu else 'cpu'}.json"
    write_json(path, record("benchmarks.memory", sys.argv[1:], figures, capacities=asdict(capacities), dtype=dtype))
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
