"""Plain YAML mappings to typed dataclasses: unknown keys, wrong types and bad values are errors that name the key."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

T = TypeVar("T")


OPERATIONAL = {"metadata": {"operational": True}}
"""Of fields that change how a run is carried out, not what comes out of it: left out of the configuration's hash."""


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the key, the value and what was expected."""


def require(condition: bool, key: str, value: Any, expected: str) -> None:
    """Raise ConfigError, naming all three, unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{key} = {value!r}: expected {expected}")


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML in which a key given twice is an error instead of silently the last one."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = {key for key in keys if keys.count(key) > 1}
        if twice:
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: key given twice: {sorted(map(str, twice))}")
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, origin: str) -> Any:
    """The value of one YAML document; raises ConfigError naming `origin`."""
    try:
        return yaml.load(text, _StrictLoader)  # a subclass of SafeLoader: plain values only
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin}: not valid YAML: {error}") from None


def read_mapping(path: Path) -> dict[str, Any]:
    """A YAML file whose top is a mapping; raises ConfigError."""
    values = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected `key: value` lines, got {type(values).__name__}")
    return values


def resolve(name: str, folder: Path, suffix: str) -> Path:
    """A path as given if it exists, else `folder/name[suffix]`; raises ConfigError that lists the known names."""
    bare = folder / (name if name.endswith(suffix) else name + suffix)
    for path in (Path(name), bare):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.stem for path in folder.glob(f"*{suffix}")))
    raise ConfigError(f"{name!r}: no such file, and none of the names in {folder}: {known}")


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set `a.b.c=value` in nested mappings, in place; the value is read as YAML."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"override {override!r}: expected key=value, e.g. train.seed=7")
    *parents, last = key.strip().split(".")
    for parent in parents:
        if not isinstance(values.get(parent), dict):
            values[parent] = {}
        values = values[parent]
    values[last] = parse_yaml(text, f"override {override!r}")


def build(cls: type[T], values: Any, path: str = "") -> T:
    """An instance of dataclass `cls` from a mapping, recursively.

    Raises ConfigError for an unknown key (with the nearest known one), a missing key, a wrong type, or whatever
    the class's own `__post_init__` finds; `path` is the dotted name of this part.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path or 'configuration'} = {values!r}: expected a mapping with keys {_names(cls)}")
    prefix = f"{path}." if path else ""
    for key in values:
        if key not in _names(cls):
            raise ConfigError(f"unknown key {prefix}{key}{_suggestion(str(key), cls)}; known here: {_names(cls)}")
    hints = typing.get_type_hints(cls)
    given = {key: convert(value, hints[key], f"{prefix}{key}") for key, value in values.items()}
    for f in fields(cls):
        if f.name not in given and f.default is MISSING and f.default_factory is MISSING:
            raise ConfigError(f"missing key {prefix}{f.name}: expected {_describe(hints[f.name])}")
    try:
        return cls(**given)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{prefix}{error}") from None


def convert(value: Any, hint: Any, key: str) -> Any:
    """`value` as the annotated type `hint`; raises ConfigError naming `key`, the value and what was expected."""
    converted = _try_convert(value, hint, key)
    if converted is _NO:
        raise ConfigError(f"{key} = {value!r}: expected {_describe(hint)}")
    return converted


_NO = object()


def _try_convert(value: Any, hint: Any, key: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        fitting = [a for a in arguments if isinstance(value, Mapping) or not is_dataclass(a)]
        candidates = (_try_convert(value, argument, key) for argument in fitting)
        return next((candidate for candidate in candidates if candidate is not _NO), _NO)
    if origin is Literal:
        return value if any(value == a and type(value) is type(a) for a in arguments) else _NO
    if origin is tuple:
        items = value if isinstance(value, (list, tuple)) else _NO
        return (
            items if items is _NO else tuple(convert(item, arguments[0], f"{key}[{i}]") for i, item in enumerate(items))
        )
    if origin is dict:
        if not isinstance(value, Mapping):
            return _NO
        return {
            convert(k, arguments[0], f"{key} key"): convert(v, arguments[1], f"{key}.{k}") for k, v in value.items()
        }
    if is_dataclass(hint):
        return build(hint, value, key)
    if hint in (int, float):
        return _number(value, hint)
    return value if isinstance(value, hint) else _NO


def _number(value: Any, kind: type) -> Any:
    """YAML reads `1e-3` as text and `1e6` is a natural way to write a count: both are taken for what they say."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return _NO
    try:
        number = float(value)
    except ValueError:
        return _NO
    if kind is float:
        return number
    return int(value) if isinstance(value, int) else int(number) if number.is_integer() else _NO


def _names(cls: type) -> list[str]:
    return [f.name for f in fields(cls)]


def _suggestion(key: str, cls: type) -> str:
    nearest = difflib.get_close_matches(key, _names(cls), n=1)
    return f" (did you mean {nearest[0]}?)" if nearest else ""


def _describe(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(argument) for argument in arguments)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin is tuple:
        return f"a list of {_describe(arguments[0])}"
    if origin is dict:
        return f"a mapping to {_describe(arguments[1])}"
    if is_dataclass(hint):
        return f"a mapping with keys {_names(hint)}"
    names = {int: "a whole number", float: "a number", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(hint, str(hint))
