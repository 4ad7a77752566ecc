"""Command: how a step scales over GPUs and nodes, on paper and in simulation."""

from __future__ import annotations

import argparse
import json
import math
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.environment import RESULTS, ROOT, fail, markdown_table, processor_slug, record, write_json
from benchmarks.scaling_model import Run, samples_of_pack
from benchmarks.scaling_tables import Loader, all_tables, plot
from fvlm.model.configuration import PRESETS
from fvlm.schema import ConfigError
from fvlm.train.gpus import GPUS, find_gpu
from fvlm.train.work_model import SAMPLES

DESCRIPTION = """Efficiency over GPUs, nodes, links and ZeRO stages, and what the loader has to give: tables and a plot.

Bytes are exact; links are data-sheet rates at an assumed share; the time of a pack is predicted from an assumed
utilisation, and says so in every table, unless --step-time or --measured gives it. docs/scaling.md explains.

--count takes steps of a tiny model on two gloo ranks and compares every byte that DeepSpeed sends with the formula.
--validate measures gloo's links with 2 and 4 ranks and steps on 1 and 2, and compares the simulator with them.

examples:
  python -m benchmarks.scaling
  python -m benchmarks.scaling --write                                  (tables and plot of docs/scaling.md)
  python -m benchmarks.scaling --model 135m --gpu h200 --step-time 0.08
  python -m benchmarks.scaling --model 135m --gpu h200 --measured benchmarks/results/throughput-135m-stage2-<gpu>.json
  python -m benchmarks.scaling --validate
"""
DOCUMENT = ROOT / "docs" / "scaling.md"
SAMPLES_PER_SECOND = ("product/samples_per_s", "product_samples_per_s", "samples_per_s", "samples_per_second")
"""Figures of a throughput result that will do, the first one that is there."""


def read_measured(path: Path) -> float:
    """Samples a second of one GPU; raises ConfigError where the file has no such figure."""
    try:
        figures = json.loads(path.read_text(encoding="utf-8"))["figures"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--measured {path}: expected a benchmark's JSON with figures: {error!r}") from None
    for name in SAMPLES_PER_SECOND:
        if name in figures:
            return _positive(f"--measured {path}: {name}", figures[name])
    raise ConfigError(f"--measured {path}: expected one of the figures {', '.join(SAMPLES_PER_SECOND)}")


def _positive(what: str, value: Any) -> float:
    if not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        raise ConfigError(f"{what} = {value!r}: expected a number above 0")
    return float(value)


def read_loader(path: Path) -> Loader:
    """A result of `benchmarks.dataloader`; raises ConfigError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Loader(
            origin=path.name,
            frames_per_core=found["figures"]["ours/workers=0/frames_per_core_s"],
            jpeg_bytes=found["set"]["jpeg_bytes"],
            cpu=f"{found['hardware']['cpu']}, {found['hardware']['cpu_cores']} cores",
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--dataloader {path}: expected a result of benchmarks.dataloader: {error!r}") from None


def newest_loader() -> Path:
    """The first result there is by name; raises ConfigError where there is none."""
    found = sorted(RESULTS.glob("dataloader-*.json"))
    if not found:
        raise ConfigError("no benchmarks/results/dataloader-*.json: run python -m benchmarks.dataloader first")
    return found[0]


def fill(document: str, tables: dict[str, str]) -> str:
    """The document with each table between its markers; raises ConfigError where a pair is missing."""
    for name, table in tables.items():
        start, end = f"<!-- scaling: {name} -->", f"<!-- end: {name} -->"
        before, found, rest = document.partition(start)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise ConfigError(f"no markers {start} and {end} for the table {name!r}")
        document = f"{before}{start}\n{table}\n{end}{after}"
    return document


def base_run(asked: argparse.Namespace) -> Run:
    """What the command line asks for; raises ConfigError."""
    run = Run(
        model=asked.model or "135m", zero="zero1", gpu=find_gpu(asked.gpu), stage=asked.mix, tokens=asked.tokens,
        overlap=asked.overlap,
    )  # fmt: skip
    if asked.tokens < 1:
        raise ConfigError(f"--tokens {asked.tokens}: expected at least 1")
    if asked.step_time is None and asked.measured is None:
        return run
    if asked.model is None:
        raise ConfigError("--step-time and --measured are of one model: say which with --model")
    if asked.step_time is not None:
        return replace(run, pack_seconds=_positive("--step-time", asked.step_time))
    return replace(run, pack_seconds=samples_of_pack(run) / read_measured(asked.measured))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling", description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--gpu", default="h100", help=f"one of {', '.join(GPUS)}; default h100")
    parser.add_argument("--model", choices=PRESETS, help="whose measured time is given; default: all, predicted")
    parser.add_argument("--mix", choices=SAMPLES, default="stage2", help="whose mean sample (default stage2)")
    parser.add_argument("--tokens", type=int, default=16384, help="rows of a pack (default 16384)")
    parser.add_argument("--overlap", action="store_true", help="with DeepSpeed's overlap_comm")
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--step-time", type=float, metavar="SECONDS", help="measured: a pack, forward and backward")
    given.add_argument("--measured", type=Path, metavar="FILE", help="throughput result of one GPU: samples a second")
    parser.add_argument("--dataloader", type=Path, help="result of benchmarks.dataloader (default: the committed one)")
    parser.add_argument("--write", action="store_true", help="write tables and plot into docs/ instead of printing")
    parser.add_argument("--count", action="store_true", help="compare bytes with what two ranks send (minutes)")
    parser.add_argument("--validate", action="store_true", help="compare the simulator with this machine (minutes)")
    parser.add_argument("--repeats", type=int, default=15, help="of each timing of --validate (default 15)")
    parser.add_argument("--json", type=Path, help="of --validate; default benchmarks/results/scaling-<machine>.json")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 done, 1 failed or bytes differ, 2 wrong usage."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    asked = parse(arguments)
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        if asked.count or asked.validate:
            return _on_ranks(asked, arguments)
        base = base_run(asked)
        tables = all_tables(base, read_loader(asked.dataloader or newest_loader()))
        if asked.write:
            DOCUMENT.write_text(fill(DOCUMENT.read_text(encoding="utf-8"), tables), encoding="utf-8")
            plot(base, ROOT / "docs" / "scaling" / "efficiency.png")
        else:
            print("\n\n".join(f"## {name}\n\n{table}" for name, table in tables.items()))
    except ConfigError as error:
        fail(str(error))
        return 2
    except (OSError, RuntimeError) as error:
        return fail(str(error))
    return 0


def _on_ranks(asked: argparse.Namespace, arguments: Sequence[str]) -> int:
    from benchmarks import scaling_validate  # DeepSpeed's import takes seconds

    if asked.count:
        rows = scaling_validate.compare_bytes()
        print(markdown_table(rows))
        return 0 if all(row["equal"] for row in rows) else 1
    figures = scaling_validate.validate(asked.repeats)
    print(markdown_table([{"figure": name, "value": f"{value:.4g}"} for name, value in figures.items()]))
    path = asked.json or RESULTS / f"scaling-{processor_slug()}.json"
    write_json(path, record("benchmarks.scaling", arguments, figures))
    print(f"\nwritten to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
