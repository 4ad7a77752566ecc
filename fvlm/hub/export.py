"""Write a Hugging Face folder: weights, configuration, processor, the code that runs them, and the model card."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from fvlm.hub.flatten import ENTRIES, flatten
from fvlm.hub.opening import stop_at_turn_end
from fvlm.hub.processing import FoveatedProcessor
from fvlm.model import FoveatedVLM, MultiTokenVLM
from fvlm.model.base import cast_parameters
from fvlm.schema import ConfigError

CLASSES = {"foveated": "FoveatedModel", "multi_token": "MultiTokenModel"}
AUTO_CLASSES = ("AutoModel", "AutoModelForImageTextToText")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def write_folder(
    out: Path,
    model: FoveatedVLM | MultiTokenVLM,
    processor: FoveatedProcessor,
    card: str,
    dtype: str = "fp32",
    replace: bool = False,
) -> Path:
    """Write everything that `AutoModel` and `AutoProcessor` need into a new folder; returns `out`.

    The folder gets its name when all of it is there. `model` is changed to `dtype`. With `replace`, an export that lies
    there gives way to it.

    Raises ConfigError where `out` exists (with `replace`: and holds what an export does not), and OSError.
    """
    if out.exists() and not replace:
        raise ConfigError(f"--out {out}: exists already; choose another folder, remove this one, or add --replace")
    partial = out.with_name(f".{out.name}.partial")
    if partial.exists():  # left by an export that was ended
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        cast_parameters(model, DTYPES[dtype])
        _describe(model, dtype)
        stop_at_turn_end(model, processor.tokenizer)
        model.save_pretrained(partial)
        (partial / "model.safetensors").chmod(0o644)  # the writer makes it private
        processor.auto_map = {"AutoProcessor": f"{ENTRIES['fvlm.hub.processing']}.FoveatedProcessor"}
        processor.save_pretrained(partial)
        for name, text in flatten().items():
            (partial / name).write_text(text, encoding="utf-8")
        (partial / "README.md").write_text(card, encoding="utf-8")
        if out.exists():
            _make_way(out, {path.name for path in partial.iterdir()})
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return out


def _make_way(out: Path, written: set[str]) -> None:
    """Remove the folder, unless that would remove more than what is written anew."""
    if others := sorted({path.name for path in out.iterdir()} - written):
        raise ConfigError(f"--out {out}: --replace replaces an export, but no export writes {', '.join(others)}")
    shutil.rmtree(out)


def _describe(model: FoveatedVLM | MultiTokenVLM, dtype: str) -> None:
    """What `config.json` has to say beside the geometry."""
    config, name = model.config, CLASSES[model.config.architecture]
    config.architectures = [name]
    config.dtype = DTYPES[dtype]
    config.auto_map = {
        "AutoConfig": f"{ENTRIES['fvlm.model.configuration']}.FoveatedConfig",
        **dict.fromkeys(AUTO_CLASSES, f"{ENTRIES['fvlm.hub.modeling']}.{name}"),
    }
