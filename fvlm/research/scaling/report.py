"""A grid's fits as a section of a report: tables, and sentences for what was refused."""

from __future__ import annotations

from typing import Any

from fvlm.research.scaling.fits import NAMES, Estimate


def fits_report(found: dict[str, Any]) -> str:
    """Markdown of what `fvlm.research.scaling.optimal.fit_grid` returns."""
    size = "parameters" if found["size"] == "parameters" else f"`{found['size']}`"
    lines = ["# Scaling", "", f"N counts {size}, D samples seen, C operations of forward and backward pass. "
             "Intervals in brackets are 95 %."]  # fmt: skip
    for kind, fits in found["kinds"].items():
        lines += ["", f"## {kind[0].upper()}{kind[1:]}", "", *_kind(fits)]
    crossover = found["crossover"]
    if crossover is not None:
        lines += ["", "## Which is ahead", "", f"{_sentence(crossover['text'])}"]
        if crossover["budgets"]:
            lines += ["", *_lowest(crossover)]
    if found["left_out"]:
        runs: dict[str, list[str]] = {}
        for run, reason in found["left_out"].items():
            runs.setdefault(reason, []).append(f"`{run}`")
        lines += ["", "## Left out", "", *(f"- {reason}: {', '.join(names)}" for reason, names in runs.items())]
    return "\n".join(lines) + "\n"


def _kind(fits: dict[str, Any]) -> list[str]:
    lines = []
    if fits["noise"] is None:
        lines += [f"{len(fits['runs'])} runs. How noisy a loss is, is not known ({fits['noise_from']}): no intervals."]
    else:
        text = f"{len(fits['runs'])} runs. A loss is uncertain by ± {fits['noise']:.2g} nats (one standard deviation"
        lines += [f"{text}: {fits['noise_from']})."]
    lines += ["", *_table(["C, FLOP", "sizes", "lowest measured", "best N", "its D", "its loss"], _budgets(fits))]
    lines += ["", _growth(fits["allocation"]), "", *_law(fits["parametric"])]
    if fits["choice"] is not None:
        chosen, reasons = fits["choice"]["size"], _sentence("; ".join(fits["choice"]["reasons"]))
        lines += ["", f"**Size to take: {chosen or 'not to be told'}.** {reasons}"]
    return lines


def _budgets(fits: dict[str, Any]) -> list[list[str]]:
    rows = []
    for budget in fits["isoflop"]:
        lowest = min(range(len(budget["losses"])), key=budget["losses"].__getitem__)
        measured = f"{budget['losses'][lowest]:.4f} at {budget['sizes'][lowest]:.3g}"
        row = [f"{budget['budget']:.3g}", str(len(budget["sizes"])), measured]
        if budget["refused"]:
            rows.append([*row, f"refused: {budget['refused']}", "–", "–"])
        else:
            rows.append([*row, *(_words(budget[name]) for name in ("optimum", "samples")), _words(budget["loss"], 4)])
    return rows


def _growth(allocation: dict[str, Any]) -> str:
    if allocation["refused"]:
        return f"N(C) and D(C) are refused: {allocation['refused']}."
    size, samples, ahead = (allocation[name] for name in ("size", "samples", "ahead"))
    text = (
        f"From the parabolas, N ∝ C^a with a = {_words(size['exponent'])} and D ∝ C^b with "
        f"b = {_words(samples['exponent'])}."
    )
    if ahead["refused"]:
        return f"{text} Nothing is said beyond the budgets measured: {ahead['refused']}."
    beyond = f"{_words(ahead['size'])} parameters and {_words(ahead['samples'])} samples"
    return f"{text} At {ahead['compute']:.3g} FLOP that would be {beyond}."


def _law(law: dict[str, Any]) -> list[str]:
    if law["refused"]:
        return ["L = E + A / N^α + B / D^β is refused:", "", *(f"- {reason}" for reason in law["refused"])]
    text = (
        f"L = E + A / N^α + B / D^β fits all runs to ± {law['residual']:.2%}, with {law['outliers']} outlier(s). "
        f"From it a = {_words(law['size_exponent'])} and b = {_words(law['sample_exponent'])} "
        f"(a sample costs as N^{law['flops_per_sample_exponent']:.2f})."
    )
    return [text, "", *_table(list(NAMES), [[_words(law[name]) for name in NAMES]])]


def _lowest(crossover: dict[str, Any]) -> list[str]:
    names = crossover["kinds"]
    columns = zip(crossover["budgets"], *(crossover["losses"][name] for name in names), strict=True)
    rows = [[f"{budget:.3g}", f"{a:.4f}", f"{b:.4f}", f"{a - b:+.4f}"] for budget, a, b in columns]
    return _table(["C, FLOP", *(f"lowest loss, {name}" for name in names), "difference"], rows)


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]


def _words(estimate: dict[str, Any], digits: int = 3) -> str:
    return Estimate(**estimate).words(digits)


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
