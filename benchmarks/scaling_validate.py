"""The formulae of bytes and of time beside what gloo ranks of this machine really send and take."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from benchmarks.ranks import run_ranks
from benchmarks.scaling_model import Cluster, Link, seconds_of
from benchmarks.scaling_ranks import (
    Case,
    count,
    count_collectives,
    fit_link,
    geometry,
    model_parameters,
    time_collectives,
    time_steps,
)
from fvlm.train.traffic import Message, gathers_of, step_messages, use_order
from fvlm.train.zero_config import read_zero_json

WHOLE = ("stage3_param_persistence_threshold", 0)
FORGETFUL = (WHOLE, ("stage3_max_reuse_distance", 0), ("stage3_prefetch_bucket_size", 0))
CASES = [
    *(Case(zero=zero, dtype=dtype, packs=2) for zero in ("zero1", "zero2", "zero3") for dtype in ("fp32", "bf16")),
    *(Case(zero=zero, dtype="bf16", packs=1) for zero in ("zero1", "zero2", "zero3")),
    Case(zero="zero0", packs=2),
    Case(zero="zero2_offload", dtype="bf16", packs=2),
    Case(zero="zero3", dtype="bf16", packs=2, changes=(WHOLE,)),
    Case(zero="zero3", dtype="bf16", packs=2, changes=FORGETFUL),
]
APPROXIMATE = 0.05  # gathers of weights that are let go at once: norms and biases are left out of `use_order`
PADDING = 1e-3  # shares are rounded up to equal sizes
TIMED_CASES = [Case(zero=zero, packs=packs) for zero in ("zero1", "zero2") for packs in (2, 4)]


def expected_messages(case: Case) -> list[Message]:
    """What `fvlm.train.traffic` says of a case; all of the tiny model's weights are below ZeRO-3's threshold."""
    zero = read_zero_json(case.zero)[0]
    changes = dict(case.changes)
    gathers = gathers_of(use_order(geometry()), changes.get("stage3_max_reuse_distance", 10**9))
    parameters = model_parameters()
    persistent = 0 if WHOLE[0] in changes else parameters.trained
    return step_messages(parameters, zero, case.dtype, case.packs, gathers, persistent)


def compare_bytes(cases: list[Case] = CASES) -> list[dict[str, Any]]:
    """A row for each case and collective: bytes counted in a real step, by the formula, and whether they are equal."""
    rows = []
    for case, counted in zip(cases, run_ranks(count, 2, cases, prepare=count_collectives), strict=True):
        expected: Counter[str] = Counter()
        for message in expected_messages(case):
            expected[message.collective] += round(message.size)
        for collective in sorted({*counted, *(+expected)}):
            found, wanted = counted.get(collective, 0), expected[collective]
            allowed = APPROXIMATE if case.changes == FORGETFUL and collective == "all_gather" else PADDING
            rows.append(
                {
                    "ZeRO": case.zero, "dtype": case.dtype, "packs": case.packs,
                    "changed": ", ".join(f"{key} = {value}" for key, value in case.changes) or None,
                    "collective": collective, "counted": found, "formula": wanted,
                    "equal": math.isclose(found, wanted, rel_tol=allowed),
                }
            )  # fmt: skip
    return rows


def validate(repeats: int) -> dict[str, float]:
    """Links by a line through their times, steps on 1 and 2 ranks, and what the simulator makes of the two."""
    figures: dict[str, float] = {}
    links: dict[int, dict[str, Link]] = {}
    for ranks in (2, 4):
        measured = run_ranks(time_collectives, ranks, repeats)
        links[ranks] = {name: fit_link(name, seconds, ranks) for name, seconds in measured.items()}
        for name, seconds in measured.items():
            link = links[ranks][name]
            figures[f"gloo/{ranks}/{name}/rate_gb_s"] = link.rate / 1e9
            figures[f"gloo/{ranks}/{name}/call_us"] = link.call * 1e6
            cluster = Cluster(gpus=ranks, inside=link)
            for size, taken in seconds.items():
                figures[f"gloo/{ranks}/{name}/{size}/ms"] = taken * 1e3
                figures[f"gloo/{ranks}/{name}/{size}/predicted_ms"] = seconds_of(name, size, cluster) * 1e3
    alone = run_ranks(time_steps, 1, TIMED_CASES, repeats)
    together = run_ranks(time_steps, 2, TIMED_CASES, repeats)
    for case, one, two in zip(TIMED_CASES, alone, together, strict=True):
        name = f"step/{case.zero}/{case.packs}"
        sent = sum(
            seconds_of(message.collective, message.size / pieces, Cluster(gpus=2, inside=links[2][message.collective]))
            * pieces
            for message in expected_messages(case)
            for pieces in [case.packs if message.moment == "backward" else 1]
        )
        figures |= {
            f"{name}/1_rank_ms": one["step"] * 1e3,
            f"{name}/2_ranks_ms": two["step"] * 1e3,
            f"{name}/2_ranks_predicted_ms": (one["step"] + sent) * 1e3,
            f"{name}/communication_predicted_ms": sent * 1e3,
            f"{name}/predicted_over_measured": (one["step"] + sent) / two["step"],
            f"{name}/efficiency": one["step"] / two["step"],
            f"{name}/efficiency_predicted": one["step"] / (one["step"] + sent),
        }
    return figures
