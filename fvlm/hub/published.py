"""Published fVLM files, whose weights carry no geometry (`fvlm.model.convert` knows their names)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, Dinov2Config, LlamaConfig

from fvlm.model import FoveatedConfig, FoveatedVLM, MultiTokenVLM, model_class
from fvlm.schema import ConfigError

BACKBONES = {"llm": ("llm_config", LlamaConfig), "vision": ("vision_config", Dinov2Config)}
TRAINING = {"lambda_coarse"}
"""Fields of published geometries that concern training alone."""


def read_geometry(file: Path) -> FoveatedConfig:
    """The geometry in a JSON file: `llm` and `vision` (or `llm_config` and `vision_config`), and other fields by name.

    Raises ConfigError for a file that is not there, is no JSON object, lacks a part, or has a field nobody knows.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--config {file}: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"--config {file}: expected a JSON object, got {type(content).__name__}")
    parts: dict[str, Any] = {}
    for short, (name, kind) in BACKBONES.items():
        given = content.pop(short, content.pop(name, None))
        if not isinstance(given, dict):
            raise ConfigError(f"--config {file}: {short}: expected the back bone's configuration, got {given!r}")
        parts[name] = kind(**given)
    known = set(FoveatedConfig().to_dict()) | TRAINING
    if unknown := sorted(content.keys() - known):
        raise ConfigError(
            f"--config {file}: unknown {', '.join(unknown)}; expected llm, vision and the model's own fields"
        )
    try:
        return FoveatedConfig(**parts, **{name: x for name, x in content.items() if name not in TRAINING})
    except (ValueError, TypeError) as error:
        raise ConfigError(f"--config {file}: {error}") from error


def geometry_of_backbones(llm: str, vision: str) -> FoveatedConfig:
    """The geometry that two back bones' configurations give; raises ConfigError where one cannot be read."""
    parts = {}
    for short, given in (("llm", llm), ("vision", vision)):
        name, kind = BACKBONES[short]
        try:
            found = AutoConfig.from_pretrained(given)
        except (OSError, ValueError) as error:
            raise ConfigError(f"--{short} {given}: {error}") from error
        if not isinstance(found, kind):
            raise ConfigError(f"--{short} {given}: expected a {kind.model_type} model, found {found.model_type}")
        parts[name] = found
    return FoveatedConfig(**parts)


def read_published(file: Path, geometry: FoveatedConfig) -> FoveatedVLM | MultiTokenVLM:
    """The model in a file.

    Raises ConfigError where there is no such file, and ValueError where it is damaged or does not fit the geometry.
    """
    if not file.is_file():
        raise ConfigError(f"{file}: no such file; download it first")
    return model_class(geometry).from_pretrained(file, config=geometry)
