"""Weights between files and models, under the published parameter names (docs/model.md, Parameters).

transformers renamed DINOv2's attention projections (``attention.attention.query`` → ``attention.q_proj``); files keep
the published names, memory has whichever the installed transformers uses, and reading accepts both.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from pickle import UnpicklingError

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .configuration import FoveatedConfig

_FLAT_TO_PUBLISHED = {
    "attention.q_proj.": "attention.attention.query.",
    "attention.k_proj.": "attention.attention.key.",
    "attention.v_proj.": "attention.attention.value.",
    "attention.o_proj.": "attention.output.dense.",
}
_DINO_LAYER = re.compile(r"(encoder\.dino\.encoder\.layer\.\d+\.)(.*)")
WEIGHT_FILES = (".safetensors", ".pt", ".pth", ".bin")
DOWNLOADED = ("*.json", "*.jinja", "*.safetensors", "*.pt")
HEAD, EMBEDDING = "llm.lm_head.weight", "llm.model.embed_tokens.weight"


def published_name(name: str) -> str:
    """The name under which the published checkpoints hold a parameter."""
    match = _DINO_LAYER.fullmatch(name)
    if not match:
        return name
    prefix, rest = match.groups()
    for flat, published in _FLAT_TO_PUBLISHED.items():
        if rest.startswith(flat):
            return prefix + published + rest[len(flat) :]
    return name


def locate(path: str | Path) -> tuple[Path, FoveatedConfig | None]:
    """The weights file behind a folder, file or Hugging Face id, and the geometry beside it.

    Raises:
        FileNotFoundError: nothing there.
    """
    local = Path(path)
    if not local.exists():
        if local.is_absolute() or len(local.parts) != 2 or local.suffix in WEIGHT_FILES:
            raise FileNotFoundError(f"{path}: no such file or folder (a Hugging Face id looks like owner/name)")
        local = Path(snapshot_download(str(path), allow_patterns=list(DOWNLOADED)))
    folder = local if local.is_dir() else local.parent
    weights = local
    if local.is_dir():
        found = [f for pattern in ("model.safetensors", "*.safetensors", "*.pt") for f in sorted(folder.glob(pattern))]
        if not found:
            raise FileNotFoundError(f"{local}: holds no model.safetensors, *.safetensors or *.pt")
        weights = found[0]
    config_file = folder / "config.json"
    has_config = config_file.is_file() and '"model_type": "fvlm"' in config_file.read_text()
    return weights, FoveatedConfig.from_pretrained(folder) if has_config else None


def read_state_dict(file: Path) -> dict[str, Tensor]:
    """A state dict from ``.safetensors``, or from a ``.pt`` that is one or holds one as ``model_state_dict``.

    Raises:
        ValueError: another kind of file, a damaged one, or contents that are not tensors by name.
    """
    if file.suffix not in WEIGHT_FILES:
        raise ValueError(f"{file}: expected a .safetensors or .pt file")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{file}: damaged, or not what its name says: {error}") from error
    state = content.get("model_state_dict", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not all(isinstance(x, Tensor) for x in state.values()):
        raise ValueError(f"{file}: expected tensors by name, or a dictionary with model_state_dict")
    return state


def load_into(model: nn.Module, state: dict[str, Tensor], origin: str) -> None:
    """Copy a state dict under old or new names into a model.

    Raises:
        ValueError: names that are missing or unknown, or shapes that differ, all listed.
    """
    incoming = {published_name(name.removeprefix("module.")): x for name, x in state.items()}
    wanted = {published_name(name): p for name, p in model.state_dict(keep_vars=True).items()}
    if model.config.llm_config.tie_word_embeddings:  # the head is the embedding, and files hold it once or twice
        wanted.pop(HEAD, None)
        if HEAD in incoming and EMBEDDING in incoming and not torch.equal(incoming[HEAD], incoming[EMBEDDING]):
            raise ValueError(f"{origin}: {HEAD} differs from {EMBEDDING}, but the geometry ties them")
        if (head := incoming.pop(HEAD, None)) is not None:
            incoming.setdefault(EMBEDDING, head)
    problems = [f"missing {name}" for name in sorted(wanted.keys() - incoming.keys())]
    problems += [f"unknown {name}" for name in sorted(incoming.keys() - wanted.keys())]
    for name in wanted.keys() & incoming.keys():
        if incoming[name].shape != wanted[name].shape:
            problems.append(f"{name}: file {tuple(incoming[name].shape)}, model {tuple(wanted[name].shape)}")
    if problems:
        raise ValueError(
            f"{origin} does not fit the geometry: " + "; ".join(problems[:12]) + (" …" if len(problems) > 12 else "")
        )
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(incoming[name])


def write_safetensors(model: nn.Module, file: Path, state: dict[str, Tensor] | None = None) -> None:
    """Write a model's weights under the published names, the tied head once, by rename."""
    state = {published_name(name): x for name, x in (state or model.state_dict()).items()}
    if model.config.llm_config.tie_word_embeddings:
        state.pop(HEAD, None)
    partial = file.with_name(f".{file.name}.partial")
    save_file({name: x.detach().cpu().contiguous() for name, x in state.items()}, partial, metadata={"format": "pt"})
    with open(partial, "rb+") as handle:
        os.fsync(handle.fileno())
    partial.rename(file)
