"""The model card: what the weights are, from the records of their run; what is not on record is said to be so."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fvlm.model import FoveatedConfig
from fvlm.research import sections
from fvlm.research.reading import with_interval
from fvlm.research.records import RunRecords
from fvlm.research.style import MODE_NAMES

PUBLISHED = {  # of fVLM-135M, per cent: coarse only, coarse→fine, autoregressive
    "MVBench": (27.4, 28.0, 27.9),
    "Video-MME": (26.2, 29.5, 28.7),
}
PUBLISHED_SCIENCEQA = 36.0  # published without its mode


def write_card(
    name: str,
    geometry: FoveatedConfig,
    *,
    origin: str,
    run: RunRecords | None = None,
    licence: str | None = None,
    looks: int = 8,
    max_frames: int = 64,
) -> str:
    """The card as markdown.

    Args:
        origin: what was exported: a checkpoint's weights, or the name of a folder or file.
        run: records of the run that made the weights; None where there are none.
        licence: of the weights, as the one who publishes them states it.
        looks, max_frames: as the processor shows stills and videos.
    """
    source = origin if run is None else f"{run.name}, {_step(origin)}"
    lines = [*_front_matter(licence), f"# {name}", ""]
    lines += _what(geometry, source, looks, max_frames) + _use(geometry, run)
    lines += _sources(run)
    if run is not None:
        lines += _training(run)
        lines += _same_checkpoint(run, origin)
        lines += sections.three_modes(run) + _captions(run)
        lines += sections.by_source(run) + sections.data(run) + sections.losses(run)
    lines += _published(run) + _limits(geometry, max_frames) + _licence(licence) + _missing(run)
    return "\n".join(lines).rstrip() + "\n"


def _front_matter(licence: str | None) -> list[str]:
    stated = [f"license: {licence}"] if licence else []
    tags = ["- video", "- foveated-vision", "- custom_code"]
    return ["---", *stated, "library_name: transformers", "pipeline_tag: video-text-to-text", "tags:", *tags, "---", ""]


def _what(geometry: FoveatedConfig, origin: str, looks: int, max_frames: int) -> list[str]:
    llm, vision = geometry.llm_config, geometry.vision_config
    if geometry.architecture == "multi_token":
        how = f"A control of the foveated model: every frame becomes {geometry.grid} pooled tokens; nothing is queried."
    else:
        count = geometry.tokens_per_frame
        tokens = "**one** token" if count == 1 else f"{count} tokens"
        how = (
            f"A foveated vision-language model: every video frame becomes {tokens}. The language model writes a query "
            "from what it has read and seen, the query looks into the frame through every layer of DINOv2, and what it "
            "saw comes back as a token."
        )
    rows = [
        ("language model", f"Llama geometry, {llm.num_hidden_layers} layers, {llm.hidden_size} wide"),
        ("vision", f"DINOv2 geometry, {vision.num_hidden_layers} layers, {vision.hidden_size} wide"),
        ("frames", f"{geometry.image_size} × {geometry.image_size} pixels, one a second, at most {max_frames} a video"),
        ("a still", f"given {looks} time{'s' if looks != 1 else ''}"),
        ("exported from", f"`{origin}`"),
    ]
    return [how, "", *sections.table(("", ""), rows)]


def _use(geometry: FoveatedConfig, run: RunRecords | None) -> list[str]:
    mode = run.trained_mode if run is not None and run.trained_mode != "coarse_fine" else None
    options = f", mode={mode!r}" if mode else ""
    lines = [
        "## Use",
        "",
        "Needs torch, transformers ≥ 5.17, Pillow and PyAV; the code in this folder stands alone.",
        "",
        "```python",
        "from transformers import AutoModel, AutoProcessor",
        "",
        'folder = "path/to/this/folder"',
        "model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()",
        "processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)",
        'inputs = processor(videos="clip.mp4", text="What happens in this video?")  # or images="photo.jpg"',
        f"tokens = model.generate(**inputs, max_new_tokens=64, do_sample=False{options})",
        "print(processor.batch_decode(tokens, skip_special_tokens=True)[0])",
        "```",
        "",
    ]
    if geometry.architecture == "foveated" and not mode:
        lines += [
            "`mode` of `model.generate` is `autoregressive` (every query written from the frames before it), "
            "`coarse_fine` (all frames twice, in parallel, as in training) or `coarse_only` (one fixed query).",
            "",
        ]
    iterations = run.setting("train.fine_iterations") if run is not None else None
    if iterations and list(iterations) != [1]:
        lines += [
            f"Trained with `fine_iterations` {iterations}; `model.generate` takes one number, the first by default.",
            "",
        ]
    return lines


def _sources(run: RunRecords | None) -> list[str]:
    sources = ((run.summary or {}).get("sources") or {}) if run is not None else {}
    if not sources:
        return ["## Training data", "", "Not on record.", ""]
    weights = run.setting("data.mixture.weights") or {}
    rows = [
        (name, weights.get(name, "natural"), terms.get("licence"), terms.get("citation"))
        for name, terms in sorted(sources.items())
    ]
    start = run.setting("init_from")
    lines = ["## Training data", "", *sections.table(("source", "weight", "licence", "citation"), rows)]
    if start:
        lines += [f"Training began from `{Path(start).name}`; the data of that run are not in this table.", ""]
    return lines


def _training(run: RunRecords) -> list[str]:
    summary = run.summary or {}
    cost, best = summary.get("cost") or {}, summary.get("best")
    money = cost.get("money")
    rates = run.setting("train.learning_rate") or {}
    rows = [
        ("objective", run.setting("train.objective")),
        ("mode", run.setting("train.mode")),
        ("steps", summary.get("steps")),
        ("samples seen", summary.get("samples_seen")),
        ("learning rates", ", ".join(f"{group} {rate['base']:g}" for group, rate in rates.items()) or None),
        ("precision", summary.get("dtype")),
        ("ranks, ZeRO stage", _joined(summary.get("world_size"), summary.get("zero_stage"))),
        ("device-hours", cost.get("gpu_hours")),
        ("money", None if money is None else f"{money:.2f} at {cost['price_per_gpu_hour']:g} a device-hour"),
        ("best checkpoint", f"step {best['step']}, score {best['score']:.4g}" if best else None),
        ("skipped samples", _joined(*(f"{k} {v}" for k, v in (summary.get("skipped_samples") or {}).items()))),
        ("commit", summary.get("commit")),
        ("hardware and versions", _joined(*(f"{k} {v}" for k, v in (summary.get("environment") or {}).items()))),
    ]
    rows = [row for row in rows if row[1] not in (None, "")]
    return ["## Training", "", *sections.table(("", ""), rows)] if rows else []


def _joined(*values: Any) -> str | None:
    return ", ".join(str(value) for value in values if value is not None) or None


def _same_checkpoint(run: RunRecords, origin: str) -> list[str]:
    """A warning where the figures are another checkpoint's."""
    measured = (run.evaluation or {}).get("checkpoint")
    if measured is None or _step(measured) == _step(origin):
        return []
    return [f"> The figures below are of `{_step(measured)}`, not of the exported `{_step(origin)}`.", ""]


def _step(weights: str) -> str:
    """The checkpoint's folder name in a path of weights."""
    return next((part for part in reversed(Path(weights).parts) if part.startswith("step-")), weights)


def _captions(run: RunRecords) -> list[str]:
    """Caption figures by task and mode, where captions were written."""
    rows = [
        (task, MODE_NAMES[mode], found["cider"], found.get("bleu_4"), found.get("meteor"), found.get("n"))
        for mode in sections.MODES
        for task, found in run.mode(mode).items()
        if isinstance(found, Mapping) and "cider" in found
    ]
    header = ("captions", "mode", "CIDEr", "BLEU-4", "METEOR", "clips")
    return ["## Captions", "", *sections.table(header, rows)] if rows else []


def _published(run: RunRecords | None) -> list[str]:
    """Benchmarks of this model beside fVLM-135M's published figures, by mode."""
    rows = []
    for task, figures in PUBLISHED.items():
        for mode, published in zip(sections.MODES, figures, strict=True):
            rows.append((task, MODE_NAMES[mode], with_interval(_benchmark(run, task, mode)), f"{published} %"))
    for mode in sections.MODES:
        if found := _benchmark(run, "ScienceQA", mode):
            rows.append(("ScienceQA", MODE_NAMES[mode], with_interval(found), None))
    rows.append(("ScienceQA", "not stated", None, f"{PUBLISHED_SCIENCEQA} %"))
    header = ("benchmark", "mode", "this model [95 %]", "fVLM-135M as published")
    note = "A dash: not measured, or not published."
    return ["## Benchmarks beside the published figures", "", *sections.table(header, rows), note, ""]


def _benchmark(run: RunRecords | None, task: str, mode: str) -> Mapping[str, Any] | None:
    """The overall accuracy of a task, however its name is written in the evaluation."""
    figures = run.mode(mode) if run is not None else {}
    wanted = _plain(task)
    for name, found in figures.items():
        if _plain(name) == wanted and isinstance(found, Mapping):
            overall = found.get("overall", found)
            return overall if {"accuracy", "low", "high"} <= overall.keys() else None
    return None


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def _limits(geometry: FoveatedConfig, max_frames: int) -> list[str]:
    size = geometry.image_size
    return [
        "## Limits",
        "",
        f"- It sees the central square of a frame, scaled to {size} × {size} pixels: what is at the edges of a wide "
        "picture, or small, is lost.",
        f"- It sees at most {max_frames} frames: of a video of more seconds than that, it misses what happens between "
        "two of them.",
        "- No sound.",
        "- It writes what is likely, which may be wrong; it was not tested for any use in which that does harm.",
        "- What its sources lack or distort, it lacks or distorts as well.",
        "",
    ]


def _licence(licence: str | None) -> list[str]:
    stated = f"The weights are published under {licence}." if licence else "No licence of the weights was stated."
    return ["## Licence", "", f"{stated} The terms of the data and of both back bones hold beside it.", ""]


def _missing(run: RunRecords | None) -> list[str]:
    if run is None:
        return ["## Not on record", "", "These weights came without the records of a run.", ""]
    if not run.missing:
        return []
    return ["## Not on record", "", *(f"- {what}" for what in run.missing), ""]
