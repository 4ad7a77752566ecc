"""What a measurement must say about itself, and how it is written down."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "flash_attn",
    "liger_kernel",
    "cut_cross_entropy",
    "simplejpeg",
    "webdataset",
    "av",
)


def commit() -> str:
    """Commit of the checkout, ``+changes`` where it has any; outside of git what ``FVLM_COMMIT`` says, or unknown.

    What benchmarks themselves write is no change.
    """
    git = ["git", "-C", str(ROOT)]
    written = [":(exclude)benchmarks/results", ":(exclude)kernels/tuned"]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        status = [*git, "status", "--porcelain", "--", ".", *written]
        changed = subprocess.run(status, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("FVLM_COMMIT", "unknown")
    return head + ("+changes" if changed.strip() else "")


def versions() -> dict[str, str]:
    """Python and the packages that matter to speed, as far as they are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def hardware() -> dict[str, Any]:
    """The machine: processor, cores and, where there is one, the GPU."""
    found: dict[str, Any] = {"machine": platform.machine(), "cpu": processor(), "cpu_cores": os.cpu_count()}
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": gpu.name,
            "compute_capability": f"{gpu.major}.{gpu.minor}",
            "multiprocessors": gpu.multi_processor_count,
            "memory_gib": round(gpu.total_memory / 2**30, 1),
            "l2_mib": round(gpu.L2_cache_size / 2**20, 1),
            "driver": _driver(),
        }
    return found


def processor() -> str:
    """The processor's name, or its kind where the system tells no more."""
    try:
        names = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return names[0].strip() if names else platform.machine()


def processor_slug() -> str:
    """The processor's name and its number of cores, for the name of a file."""
    name = re.sub(r"\((?:R|TM)\)|\b(?:CPU|Processor)\b|@.*", " ", processor(), flags=re.IGNORECASE)
    return "-".join([*re.findall("[a-z0-9.]+", name.lower()), f"{os.cpu_count()}-cores"])


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def record(module: str, arguments: Sequence[str], figures: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The contents of a result file.

    Args:
        module: what ``python -m`` was given.
        arguments: what followed it on the command line.
        figures: flat: name → value.
        more: further top-level entries.
    """
    return {
        "figures": figures,
        **more,
        "command": " ".join(["python -m", module, *arguments]),
        "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "versions": versions(),
        "hardware": hardware(),
    }


def write_json(path: Path, contents: dict[str, Any]) -> None:
    """Write a JSON file, complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(contents, indent=1, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows with the same columns as a markdown table; None is shown as a dash."""
    if not rows:
        return "(nothing)"
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    lines += [["–" if value is None else str(value) for value in row.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def fail(message: str) -> int:
    """One clear message on stderr, and the exit code for it."""
    print(f"error: {message}", file=sys.stderr)
    return 1
