"""Our loader on the drawn samples, in a process of its own: its speed, or its memory over many packs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.dataloader_clock import memory, print_figures, reading
from fvlm.data.chat import load_tokenizer
from fvlm.data.loader import LoadedStep, PackLoader
from fvlm.data.plan import Capacities, Mixture, Plan, SampleTable
from fvlm.data.shard import find_shards, load_index

TOKENS = 8192
"""Of a pack that is measured: about the samples of a rival's batch."""
FLAT = 0.01
"""Growth of a worker's resident memory, from the second to the last quarter of a long run, that counts as none."""
_LOOKS = 200  # at the memory, in a long run


def open_loader(folder: Path, num_workers: int, tokens: int, num_samples: int | None = None) -> PackLoader:
    """Packs of `tokens` tokens of the samples in `folder/shards`: each once, or `num_samples` again and again."""
    tokenizer = load_tokenizer("tiny")
    shards = find_shards(folder / "shards")
    indexes = [load_index(shard, tokenizer) for shard in shards]
    table, mixture = SampleTable.from_indexes(indexes), Mixture()
    capacities = Capacities.propose(table, mixture, tokens=tokens, objective="ce_answer")
    plan = Plan(table, mixture, capacities, "ce_answer", 0, num_samples or len(table))
    size = json.loads((folder / "set.json").read_text())["image_size"]
    return PackLoader(plan, shards, indexes, tokenizer, size, packs_per_step=1, num_workers=num_workers)


def stream(loader: PackLoader) -> Iterator[tuple[int, int]]:
    """Samples and frames of each pack, looked at as it is: every tensor is there."""
    for loaded in loader:
        _require_whole(loaded)
        yield loaded.step.samples, loaded.step.packs[0].frames


def _require_whole(loaded: LoadedStep) -> None:
    if loaded.lost:
        raise ValueError(f"lost {loaded.lost[0]}")


def soak(folder: Path, num_workers: int, num_packs: int, tokens: int) -> dict[str, Any]:
    """What `summary` says of the memory over `num_packs` packs."""
    torch.set_num_threads(1)
    looks: list[dict[str, float]] = []
    loader = open_loader(folder, num_workers, tokens, num_samples=num_packs * tokens)  # more than can be in them
    every = max(num_packs // _LOOKS, 1)
    for number, loaded in enumerate(tqdm(loader, "packs", num_packs, disable=None), 1):
        _require_whole(loaded)
        if number % every == 0:
            looks.append(memory(num_workers))
        if number == num_packs:
            break
    return {"packs": num_packs, "workers": num_workers, **summary(looks)}


def summary(looks: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Of what `memory` said: median of each quarter of the run, the most, and growth from the second to the last.

    The first quarter fills what is kept: open shards, the allocator's arenas.
    """
    quarter = max(len(looks) // 4, 1)
    found: dict[str, Any] = {}
    for name in looks[0]:
        values = [look[name] for look in looks]
        quarters = [median(values[i * quarter : (i + 1) * quarter] or values[-1:]) for i in range(4)]
        found |= {f"{name}_quarter_{i}": value for i, value in enumerate(quarters, 1)}
        found |= {f"{name}_most": max(values), f"{name}_growth": quarters[3] / quarters[1] - 1}
    return {**found, "flat": found["resident_mib_growth"] <= FLAT}


def main(arguments: Sequence[str] | None = None) -> int:
    """Read and print figures, as `benchmarks.dataloader` asks for them."""
    parser = reading(argparse.ArgumentParser(prog="python -m benchmarks.dataloader_ours"))
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of a pack")
    parser.add_argument("--soak", type=int, metavar="PACKS", help="memory over this many packs")
    asked = parser.parse_args(arguments)
    if asked.soak:
        print(json.dumps(soak(asked.folder, asked.workers, asked.soak, asked.tokens)))
    else:
        print_figures(lambda: stream(open_loader(asked.folder, asked.workers, asked.tokens)), asked)
    return 0


if __name__ == "__main__":
    sys.exit(main())
