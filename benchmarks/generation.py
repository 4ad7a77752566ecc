"""Autoregressive looking: milliseconds a frame and memory, alone over a long stream and batched against coarse→fine.

python benchmarks/generation.py                     (135m geometry on a GPU, tiny on a CPU; random weights)
python -m benchmarks.generation --model tiny --lengths 64 512 --batch 4

*Stream*: frames pushed one by one into a `FoveatedStream` (batch 1), the last 32 before each length timed. *Batched*:
passes over clips of the same length, autoregressive and coarse→fine in turns; their ratio is `batched_ratio`.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
if not __package__:  # started as a file: the package is the folder above
    sys.path[0] = str(ROOT)

from benchmarks.environment import RESULTS, markdown_table, processor_slug, record, write_json  # noqa: E402
from fvlm.kernels.launching import gpu_slug  # noqa: E402
from fvlm.model import FoveatedVLM, build_model, tiny_config  # noqa: E402
from fvlm.model.base import cast_parameters  # noqa: E402
from fvlm.model.configuration import PRESETS, preset_config  # noqa: E402
from fvlm.model.padded import pack_padded  # noqa: E402
from fvlm.model.stream import FoveatedStream  # noqa: E402

TIMED = 32
"""Frames timed before each length."""
TEXT = 32
"""Text tokens behind each clip of a batch."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    parser.add_argument("--model", choices=["tiny", *PRESETS], default="135m" if gpu else "tiny")
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 512, 4096], help="frames seen by a stream")
    parser.add_argument("--batch", type=int, default=32 if gpu else 8, help="clips in one pass")
    parser.add_argument("--frames", type=int, default=64, help="frames of each of these clips")
    parser.add_argument("--runs", type=int, default=5, help="timed passes of each mode")
    parser.add_argument("--json", type=Path, help="result file; default benchmarks/results/generation-<machine>.json")
    args = parser.parse_args(arguments)
    for name in ("batch", "frames", "runs"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: expected at least 1")
    if min(args.lengths) < TIMED + 1:
        parser.error(f"--lengths {min(args.lengths)}: expected more than {TIMED}, which are timed before each")
    return args


def build(name: str, device: torch.device) -> FoveatedVLM:
    """The geometry with random weights: bf16 on a GPU, fp32 on a CPU."""
    torch.manual_seed(0)
    model = build_model(tiny_config(512) if name == "tiny" else preset_config(name)).eval().to(device)
    return cast_parameters(model, torch.bfloat16) if device.type == "cuda" else model


def seconds(device: torch.device) -> float:
    """Now, when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def stream(model: FoveatedVLM, lengths: list[int], device: torch.device) -> list[dict[str, float]]:
    """Time and memory of a frame at each length of one stream."""
    side = model.config.image_size
    frames = torch.randint(0, 256, (TIMED, 3, side, side), dtype=torch.uint8, device=device)
    watched, rows = FoveatedStream(model, memory=max(lengths)), []
    with tqdm(total=max(lengths), desc="stream", unit="frame", disable=None) as progress:
        for length in sorted(lengths):
            while watched.frames_seen < length - TIMED:
                watched.push(frames[: min(TIMED, length - TIMED - watched.frames_seen)])
                progress.update(watched.frames_seen - progress.n)
            times = []
            for index in range(TIMED):
                begin = seconds(device)
                watched.push(frames[index : index + 1])
                times.append(seconds(device) - begin)
            progress.update(watched.frames_seen - progress.n)
            rows.append({"frames": length, "ms_a_frame": 1e3 * median(times), **memory(watched, device)})
    return rows


def memory(watched: FoveatedStream, device: torch.device) -> dict[str, float]:
    """MiB of the tokens kept, and at the process's peak: of the allocator on a GPU, resident on a CPU."""
    layers = watched._cache.layers
    on_gpu = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_gpu else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"cache_mib": sum(x.keys.nbytes + x.values.nbytes for x in layers) / 2**20, "peak_mib": peak / 2**20}


@torch.no_grad()
def batched(model: FoveatedVLM, clips: int, num_frames: int, runs: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of passes over the same clips, mode by mode in turns, the first of each left out."""
    side = model.config.image_size
    frames = torch.randint(0, 256, (clips, num_frames, 3, side, side), dtype=torch.uint8)
    ids = torch.randint(3, model.config.llm_config.vocab_size, (clips, TEXT))
    batch = pack_padded(model.config, frames, ids, labels=ids).batch.to(device)
    times: dict[str, list[float]] = {"autoregressive": [], "coarse_fine": []}
    for run in tqdm(range(runs + 1), desc="batched", unit="round", disable=None):
        for mode, found in times.items():
            begin = seconds(device)
            model(batch=batch, mode=mode)
            end = seconds(device)
            if run:
                found.append(end - begin)
    return times


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write."""
    args = parse(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build(args.model, device)
    rows = stream(model, args.lengths, device)
    times = batched(model, args.batch, args.frames, args.runs, device)
    looked = args.batch * args.frames
    figures = {f"{key}_{row['frames']}": row[key] for row in rows for key in row if key != "frames"}
    figures |= {f"batched_{mode}_ms_a_frame": 1e3 * median(found) / looked for mode, found in times.items()}
    figures["batched_ratio"] = median(a / b for a, b in zip(times["autoregressive"], times["coarse_fine"], strict=True))
    figures["longest_over_shortest"] = rows[-1]["ms_a_frame"] / rows[0]["ms_a_frame"]
    print(markdown_table([{key: round(value, 3) for key, value in row.items()} for row in rows]))
    print(f"{args.batch} clips of {args.frames} frames, ms a frame: " + ", ".join(
        f"{mode} {figures[f'batched_{mode}_ms_a_frame']:.3f}" for mode in times
    ) + f"; autoregressive over coarse→fine {figures['batched_ratio']:.2f}")  # fmt: skip
    machine = gpu_slug(torch.cuda.get_device_name()) if device.type == "cuda" else processor_slug()
    path = args.json or RESULTS / f"generation-{args.model}-{machine}.json"
    given = [str(x) for x in (sys.argv[1:] if arguments is None else arguments)]
    write_json(path, record("benchmarks.generation", given, figures, model=args.model, batch=args.batch))
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
