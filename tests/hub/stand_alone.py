"""A script for a process of its own: loads exported folders as a stranger would, and writes down what they say.

    python -P stand_alone.py jobs.json results.pt

First of all it makes everything disappear that a clean environment would not have: left are torch, transformers,
Pillow, PyAV and what they require; neither this project nor Triton.
"""

from __future__ import annotations

import importlib.metadata as metadata
import importlib.util
import json
import re
import sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder

INSTALLED = ("torch", "transformers", "pillow", "av")
NEVER = {"fvlm", "triton", "deepspeed", "webdataset", "simplejpeg"}  # torch requires Triton on some machines
MODES = ("coarse_fine", "coarse_only", "autoregressive")


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def required() -> set[str]:
    """Distributions that installing `INSTALLED` brings."""
    found, waiting = set(), list(INSTALLED)
    while waiting:
        name = canonical(waiting.pop())
        if name in found:
            continue
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # one for other platforms
            continue
        found.add(name)
        waiting += [re.match(r"[\w.-]+", need).group() for need in needs if "extra ==" not in need]
    return found


ALLOWED = required()
HIDDEN = NEVER | {
    package
    for package, owners in metadata.packages_distributions().items()
    if not {canonical(owner) for owner in owners} & ALLOWED
}


class Clean(PathFinder):
    """Finds what a clean environment has."""

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        return None if fullname.split(".")[0] in HIDDEN else super().find_spec(fullname, path, target)


sys.meta_path[:] = [BuiltinImporter, FrozenImporter, Clean]

import torch  # noqa: E402
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor  # noqa: E402
from transformers.dynamic_module_utils import get_class_from_dynamic_module  # noqa: E402


def logits_by_mode(model, inputs: dict) -> dict:
    with torch.no_grad():
        return {mode: model(**inputs, mode=mode).logits for mode in MODES}


def answer(model, processor, **media) -> dict:
    inputs = processor(text="What is in the middle?", **media)
    tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    return {"inputs": dict(inputs), "tokens": tokens, "text": processor.batch_decode(tokens, skip_special_tokens=True)}


def stream(folder: str, model, inputs: dict) -> torch.Tensor:
    """The answer after the same frames pushed one by one."""
    watching = get_class_from_dynamic_module("modeling_fvlm.FoveatedStream", folder)(model)
    for frame in inputs["frames"][0]:
        watching.push(frame[None])
    return watching.ask(inputs["input_ids"][0], max_new_tokens=6, do_sample=False)


def work(job: dict) -> dict:
    model, notes = AutoModel.from_pretrained(job["folder"], trust_remote_code=True, output_loading_info=True)
    found = {"notes": {name: sorted(map(str, keys)) for name, keys in notes.items()}, "class": type(model).__name__}
    found["logits"] = logits_by_mode(model, torch.load(job["inputs"]))
    if "clip" in job:
        processor = AutoProcessor.from_pretrained(job["folder"], trust_remote_code=True)
        found["clip"] = answer(model, processor, videos=job["clip"])
        found["picture"] = answer(model, processor, images=job["picture"])
        found["stream"] = stream(job["folder"], model, found["clip"]["inputs"])
        model.save_pretrained(job["again"])
        processor.save_pretrained(job["again"])
        again = AutoModelForImageTextToText.from_pretrained(job["again"], trust_remote_code=True, dtype=torch.bfloat16)
        found["again"] = logits_by_mode(again, torch.load(job["inputs"]))
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    with open(sys.argv[1], encoding="utf-8") as file:
        results = {name: work(job) for name, job in json.load(file).items()}
    results["at hand"] = sorted(name for name in NEVER | {"pytest"} if importlib.util.find_spec(name))
    torch.save(results, sys.argv[2])
