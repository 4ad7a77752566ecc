"""Peak memory of training steps, by phase and component, beside what the planner predicts.

python -m benchmarks.memory --model 135m --ranks 2 --zero zero2 --checkpointing 1
python -m benchmarks.memory --model 1b7 --zero zero2_offload --tokens 8192 --frames 176 --checkpointing 1     (on a GPU)
python -m benchmarks.memory --model 1b7 --zero zero2_offload --tokens 8192 --frames 176 --checkpointing 1 \
    --limit 30 --steps 100 --packs 1           (does a card of 32 GB hold a hundred steps? --limit caps the allocator)

Steps of worst-case packs on each rank, with random weights; every figure is the largest of all steps but the first.
On a GPU memory is the allocator's; on the CPU it is what is alive (`fvlm.train.live_memory`), with the process's
resident set beside it.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm import trange

from benchmarks.environment import RESULTS, fail, markdown_table, record, write_json
from benchmarks.ranks import run_ranks
from fvlm.config import load_config
from fvlm.data.capacities import Capacities
from fvlm.model import FoveatedConfig, build_model, tiny_config
from fvlm.model.configuration import PRESETS, preset_config
from fvlm.model.packed import PackedBatch
from fvlm.train.engine import Engine, World
from fvlm.train.gpus import GIB
from fvlm.train.live_memory import LiveMemory
from fvlm.train.planner import predict
from fvlm.train.preflight import worst_case_pack
from fvlm.train.zero_config import read_zero_json
from fvlm.train_config import CheckpointingConfig

RATES = {"connector": 1e-6, "dino": 1e-6, "llm": 1e-6}
BESIDE = ("fragmentation", "CUDA context")
"""Components of a prediction that an allocator's own figures do not hold."""
ENGINE = ("fp32 masters", "Adam moments")
"""Components that stay from step to step, beside weights and pack; gradients and buffers do not."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=(*PRESETS, "tiny"), default="135m")
    parser.add_argument("--ranks", type=int, default=1, help="processes on this machine")
    parser.add_argument("--zero", default="zero2", help="DeepSpeed JSON, by name or path")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--tokens", type=int, default=512, help="rows of the pack, T")
    parser.add_argument("--frames", type=int, default=8, help="frames of the pack, F")
    parser.add_argument("--longest", type=int, help="rows of the longest sample; default a quarter of the pack's")
    parser.add_argument("--checkpointing", type=float, default=0.0, help="share of blocks that are recomputed, 0 to 1")
    parser.add_argument("--packs", type=int, default=2, help="packs of a step on each rank")
    parser.add_argument("--steps", type=int, default=2, help="steps, at least 2")
    parser.add_argument("--seconds", type=float, help="no more steps after this time; the result says how many it were")
    parser.add_argument("--limit", type=float, help="GiB that may be taken of a GPU; default: all of it")
    parser.add_argument("--json", type=Path, help="result file; default benchmarks/results/memory-<what>.json")
    return parser.parse_args(arguments)


def geometry_of(args: argparse.Namespace) -> FoveatedConfig:
    """The model's."""
    return tiny_config(512) if args.model == "tiny" else preset_config(args.model)


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
    """Phase, or `held` between steps → bytes, of all steps but the first, in which things are allocated; and `done`."""
    if args.limit is not None and world.device.type == "cuda":
        total = torch.cuda.get_device_properties(world.device).total_memory
        torch.cuda.set_per_process_memory_fraction(args.limit * GIB / total, world.device)
    train = load_config("tiny_test").train
    shares = CheckpointingConfig(encoder=args.checkpointing, llm=args.checkpointing)
    packs = args.packs * world.size
    train = replace(train, packs_per_step=packs, dtype=args.dtype or "auto", activation_checkpointing=shares)
    gauge = Gauge(world.device)
    torch.manual_seed(0)
    model = build_model(geometry_of(args)).train()
    batch = worst_case_pack(model.config, capacities_of(args)).to(world.device)
    engine = Engine(model, train, *read_zero_json(args.zero), world)
    gauge.count_what_is_there(engine.module)
    largest: dict[str, dict[str, float]] = {}
    begin, done = time.monotonic(), 0
    with gauge.live:
        for step in trange(args.steps, unit="step", disable=not world.is_main):
            phases = _step(engine, batch, gauge)
            if step:
                largest = {name: _larger(read, largest.get(name, {})) for name, read in phases.items()}
            done = step + 1
            late = args.seconds is not None and time.monotonic() - begin > args.seconds
            if done >= 2 and world.broadcast(late):
                break
    return largest | {"held": held(engine.module, batch), "done": {"steps": done}}


def _step(engine: Engine, batch: PackedBatch, gauge: Gauge) -> dict[str, dict[str, float]]:
    phases: dict[str, dict[str, float]] = {}
    for _ in range(engine.accumulation):  # the second time, the first's gradients are there
        gauge.start()
        out = engine.forward(batch=batch)
        phases["forward"] = gauge.read()
        gauge.start()
        engine.backward(out.loss_sum, engine.accumulation * int(out.num_labels) * engine.world.size)
        del out
        phases["backward"] = gauge.read()
    gauge.start()
    engine.step(RATES)
    phases["step"] = gauge.read()
    return phases


def _larger(read: dict[str, float], before: dict[str, float]) -> dict[str, float]:
    return {key: max(value, before.get(key, 0.0)) for key, value in read.items()}


def held(model: torch.nn.Module, batch: PackedBatch) -> dict[str, float]:
    """Bytes on the device between steps: of the weights, of the pack, and the engine's, which are all others."""
    gc.collect()
    device = batch.token_ids.device
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    pack = {x.untyped_storage()._cdata for x in vars(batch).values() if isinstance(x, torch.Tensor)}
    found = [x for x in gc.get_objects() if isinstance(x, torch.Tensor) and x.device == device]
    sizes = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in found}
    bytes_of = {"weights": 0.0, "pack": 0.0, "engine": 0.0}
    for key, size in sizes.items():
        bytes_of["weights" if key in weights else "pack" if key in pack else "engine"] += size
    return bytes_of


def components(measured: dict[str, float], peak: float, predicted: dict[str, float]) -> list[dict[str, str]]:
    """Rows of a table: what is held between steps and what the peak takes beyond it, measured and predicted, GiB."""
    rows, beyond = [], "the peak beyond these"
    took = measured | {beyond: peak - sum(measured.values())}
    planned = dict.fromkeys(took, 0.0)
    for name, size in predicted.items():
        if name not in BESIDE:
            planned["engine" if name in ENGINE else name if name in took else beyond] += size
    for name, size in took.items():
        rows.append({"component": name, "measured": f"{size / GIB:.3f}", "predicted": f"{planned[name] / GIB:.3f}"})
    return rows


def main() -> int:
    """Measure on ranks of our own, predict, print, write."""
    args = parse()
    if args.steps < 2 or args.packs < 1:
        print("error: --steps: expected at least 2, --packs: at least 1", file=sys.stderr)
        return 2
    warnings.filterwarnings("ignore", category=FutureWarning)
    on_gpu = torch.cuda.is_available()
    dtype = args.dtype or ("bf16" if on_gpu else "fp32")
    try:
        phases = run_ranks(measure, args.ranks, args)
    except RuntimeError as error:
        return fail(str(error).splitlines()[-1])
    between, steps = phases.pop("held"), phases.pop("done")["steps"]
    shares, capacities = CheckpointingConfig(encoder=args.checkpointing, llm=args.checkpointing), capacities_of(args)
    predicted = predict(
        geometry_of(args), capacities, read_zero_json(args.zero)[0], args.ranks, dtype=dtype,
        checkpointing=shares, backend="triton" if on_gpu else "torch",
    )  # fmt: skip
    whole = sum(size for name, size in predicted.items() if name not in BESIDE)
    peak = max(phase["peak"] for phase in phases.values())
    rows = [{"phase": name} | {k: f"{v / GIB:.3f}" for k, v in phase.items()} for name, phase in phases.items()]
    print(f"{markdown_table(rows)}\n\npredicted, GiB: " + ", ".join(f"{k} {v / GIB:.3f}" for k, v in predicted.items()))
    print(f"\n{markdown_table(components(between, peak, predicted))}\n")
    print(f"{steps} of {args.steps} steps: peak {peak / GIB:.3f} GiB, ", end="")
    print(f"predicted {whole / GIB:.3f} GiB: {whole / peak - 1:+.1%}")
    figures = {
        "peak_gib": peak / GIB,
        "predicted_gib": whole / GIB,
        "predicted_over_measured": whole / peak,
        "steps": steps,
        **{f"held_{name}_gib": size / GIB for name, size in between.items()},
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
