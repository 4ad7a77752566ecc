"""The product's own modules as flat files that stand alone, for a Hugging Face folder.

transformers copies a folder's `.py` files one by one, following `from .name import …`, and knows no packages. So every
module becomes one file whose name is its path (`fvlm.model.base` → `model_base.py`), reduced to the definitions that
the roots need, with its imports rewritten and everything else as it stands, comments included. What is published
cannot differ from what was trained, since it is the same text.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent
PACKAGE = "fvlm"
ENTRIES = {
    "fvlm.model.configuration": "configuration_fvlm",
    "fvlm.hub.modeling": "modeling_fvlm",
    "fvlm.hub.processing": "processing_fvlm",
}
"""Modules that `auto_map` names, and their files' names."""
ROOTS = {
    "fvlm.model.configuration": ("FoveatedConfig",),
    "fvlm.hub.modeling": ("FoveatedModel", "FoveatedStream", "MultiTokenModel"),
    "fvlm.hub.processing": ("FoveatedProcessor",),
}
"""What has to be there."""
INSTEAD = {
    f"fvlm.kernels.{op}": "fvlm.hub.operations"
    for op in ("query_attention", "varlen_attention", "linear_cross_entropy")
}
"""Modules whose names are taken from another one."""
AT_HAND = {"torch", "transformers", "PIL", "av", "numpy", "tokenizers", "huggingface_hub", "safetensors"}
"""What a flat file may import beside the standard library: torch, transformers, Pillow, PyAV and what these need."""

_IMPORTS = (ast.Import, ast.ImportFrom)


@dataclass(eq=False)
class _Statement:
    """One statement of a module's top level, with the comments before it."""

    node: ast.stmt
    first: int
    """Its lines are first:last of the module, from 0."""
    last: int
    defines: set[str]
    uses: set[str]
    about: str | None = None
    """Of a call such as `name.register(…)`: a definition of the module, with which it comes and goes."""
    kept: bool = False


@dataclass(eq=False)
class _Module:
    name: str
    path: Path
    lines: list[str]
    statements: list[_Statement]
    used: set[str] = field(default_factory=set)
    """Names that its kept statements use, or that others take from it."""


def flatten(roots: Mapping[str, Iterable[str]] = ROOTS, instead: Mapping[str, str] = INSTEAD) -> dict[str, str]:
    """Text by file name (`model_base.py`) of everything that the names in `roots`, by module, need.

    Raises ValueError where a module cannot be flattened: a name that is not there, a module used as a value, or an
    import of a package that a reader of the folder does not have.
    """
    bundle = _Bundle(instead)
    for module, names in roots.items():
        for name in names:
            bundle.need(module, name)
    return {f"{flat_name(module)}.py": bundle.text(module) for module in sorted(bundle.modules)}


def flat_name(module: str) -> str:
    """`fvlm.model.base` → `model_base`."""
    return ENTRIES.get(module, "_".join(module.split(".")[1:]))


class _Bundle:
    """Modules with what is needed of them marked."""

    def __init__(self, instead: Mapping[str, str]):
        self.modules: dict[str, _Module] = {}
        self._instead = instead

    def need(self, name: str, definition: str) -> None:
        """Mark a definition, and everything that it needs."""
        module = self.modules.get(name) or self._open(name)
        if definition in module.used:
            return
        module.used.add(definition)
        found = [statement for statement in module.statements if definition in statement.defines]
        if not found:
            raise ValueError(f"flatten: {module.path} defines no {definition}")
        about = [statement for statement in module.statements if statement.about == definition]
        for statement in found + about:
            self._keep(module, statement, definition)

    def _open(self, name: str) -> _Module:
        module = self.modules[name] = _parse(name)
        for statement in module.statements:
            if not statement.defines and statement.about is None:
                self._keep(module, statement, None)  # it is there for what it does, such as registering
        return module

    def _keep(self, module: _Module, statement: _Statement, definition: str | None) -> None:
        if isinstance(statement.node, ast.ImportFrom) and self._is_internal(module, statement.node):
            self._follow(module, statement.node, definition)
            return
        if statement.kept:
            return
        statement.kept = True
        for name in self._modules_by_name(module):
            mentions = sum(isinstance(node, ast.Name) and node.id == name for node in ast.walk(statement.node))
            if mentions != len(list(_attributes_of(statement.node, name))):
                raise ValueError(f"flatten: {module.path} uses the module {name} as a value; take names from it")
        for node in ast.walk(statement.node):
            if isinstance(node, ast.ImportFrom) and self._is_internal(module, node):
                self._follow_nested(module, node)
        known = {name for each in module.statements for name in each.defines}
        for name in statement.uses & known:
            self.need(module.name, name)

    def _follow(self, module: _Module, node: ast.ImportFrom, definition: str | None) -> None:
        for alias in node.names:
            if definition in (alias.asname, alias.name):
                target, attribute = self.resolve(module, node, alias)
                if attribute is not None:
                    self.need(target, attribute)
                else:
                    for name in self._attributes(module, alias.asname or alias.name):
                        self.need(target, name)

    def _follow_nested(self, module: _Module, node: ast.ImportFrom) -> None:
        """An import inside a function or under `if TYPE_CHECKING`."""
        for alias in node.names:
            target, attribute = self.resolve(module, node, alias)
            if attribute is None:
                raise ValueError(f"flatten: {module.path}, line {node.lineno}: import names from {target} here")
            self.need(target, attribute)

    def _attributes(self, module: _Module, name: str) -> set[str]:
        """What is taken from the module that is imported as `name`."""
        return {node.attr for statement in module.statements for node in _attributes_of(statement.node, name)}

    def _is_internal(self, module: _Module, node: ast.ImportFrom) -> bool:
        return _absolute(module.name, node).split(".")[0] == PACKAGE

    def resolve(self, module: _Module, node: ast.ImportFrom, alias: ast.alias) -> tuple[str, str | None]:
        """(module, name) behind an imported name; the name is None where it is a module itself."""
        base = _absolute(module.name, node)
        return _definition(self._instead.get(base, base), alias.name)

    # -- writing --------------------------------------------------------------------------------------------------

    def text(self, name: str) -> str:
        """A module as a flat file."""
        module = self.modules[name]
        parts = []
        for statement in module.statements:
            node = statement.node
            if isinstance(node, _IMPORTS):
                parts += [f"{line}\n" for line in self._import(module, node)]
            elif statement.kept:
                parts.append(self._rewritten(module, statement))
        where = module.path.relative_to(REPOSITORY).as_posix()
        text = f"# Written by launch/export.py from {where}; to be changed there.\n" + "".join(parts)
        _check_packages(text, module.path)
        return text

    def _import(self, module: _Module, node: ast.Import | ast.ImportFrom) -> list[str]:
        """A top-level import, reduced to what is used."""
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            return [ast.unparse(node), ""]
        used = [alias for alias in node.names if (alias.asname or alias.name).split(".")[0] in module.used]
        if not used:
            return []
        if isinstance(node, ast.Import):
            return [ast.unparse(ast.Import(used))]
        if not self._is_internal(module, node):
            return [ast.unparse(ast.ImportFrom(node.module, used, node.level))]
        return self._internal(module, node, used)

    def _internal(self, module: _Module, node: ast.ImportFrom, used: list[ast.alias]) -> list[str]:
        """An import from the product, one line a flat file."""
        names: dict[str, list[str]] = {}
        for alias in used:
            target, attribute = self.resolve(module, node, alias)
            here = alias.asname or alias.name
            taken = names.setdefault(flat_name(target), [])
            if attribute is not None:
                taken.append(attribute + (f" as {here}" if here != attribute else ""))
            else:
                taken += [f"{name} as {here}_{name}" for name in sorted(self._attributes(module, here))]
        return [f"from .{flat} import {', '.join(taken)}" for flat, taken in names.items()]

    def _rewritten(self, module: _Module, statement: _Statement) -> str:
        """A statement's lines, with `module.name` of the product's modules as `module_name`."""
        lines = module.lines[statement.first : statement.last]
        nested = [node for node in ast.walk(statement.node) if isinstance(node, ast.ImportFrom)]
        for node in nested:
            if self._is_internal(module, node):
                new = self._internal(module, node, node.names)
                begin, end = node.lineno - 1 - statement.first, node.end_lineno - statement.first
                text = "".join(f"{' ' * node.col_offset}{line}\n" for line in new)
                lines[begin:end] = [text, *[""] * (end - begin - 1)]  # as many as before: numbers stay
        for name in self._modules_by_name(module):
            for node in _attributes_of(statement.node, name):
                number = node.value.end_lineno - 1 - statement.first
                line = lines[number].encode()
                at = node.value.end_col_offset
                if line[at : at + 1] != b".":
                    raise ValueError(
                        f"flatten: {module.path}, line {node.lineno}: {name}.{node.attr} is not in one piece"
                    )
                lines[number] = (line[:at] + b"_" + line[at + 1 :]).decode()
        return "".join(lines)

    def _modules_by_name(self, module: _Module) -> Iterator[str]:
        for statement in module.statements:
            if isinstance(statement.node, ast.ImportFrom) and self._is_internal(module, statement.node):
                for alias in statement.node.names:
                    if self.resolve(module, statement.node, alias)[1] is None:
                        yield alias.asname or alias.name


def _file(module: str) -> Path | None:
    """A module's or package's file; None where there is no such module."""
    path = REPOSITORY.joinpath(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def _parse(name: str) -> _Module:
    path = _file(name)
    if path is None:
        raise ValueError(f"flatten: no module {name} in {REPOSITORY}")
    text = path.read_text(encoding="utf-8")
    statements: list[_Statement] = []
    last = 0
    for node in ast.parse(text).body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_docstring and statements and statements[-1].defines:  # of the assignment before it
            statements[-1].last = node.end_lineno
        else:
            statements.append(_Statement(node, last, node.end_lineno, _defined(node), _names(node)))
        last = node.end_lineno
    made_here = {name for each in statements if not isinstance(each.node, _IMPORTS) for name in each.defines}
    for statement in statements:
        if isinstance(statement.node, ast.Expr) and isinstance(statement.node.value, ast.Call):
            first = next(each.id for each in ast.walk(statement.node.value.func) if isinstance(each, ast.Name))
            statement.about = first if first in made_here else None
    return _Module(name, path, text.splitlines(keepends=True), statements)


def _defined(node: ast.stmt) -> set[str]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, _IMPORTS):
        return {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    names = [each for target in targets if target is not None for each in ast.walk(target)]
    return {each.id for each in names if isinstance(each, ast.Name)}


def _names(node: ast.stmt) -> set[str]:
    return {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}


def _attributes_of(node: ast.stmt, name: str) -> Iterator[ast.Attribute]:
    for each in ast.walk(node):
        if isinstance(each, ast.Attribute) and isinstance(each.value, ast.Name) and each.value.id == name:
            yield each


def _absolute(module: str, node: ast.ImportFrom) -> str:
    """The module that an import names, without dots in front."""
    if not node.level:
        return node.module or ""
    is_package = _file(module).name == "__init__.py"
    parts = module.split(".")
    parts = parts[: len(parts) - node.level + is_package]
    return ".".join([*parts, node.module] if node.module else parts)


def _definition(base: str, name: str) -> tuple[str, str | None]:
    """Where `from base import name` leads, through the packages that pass it on."""
    if _file(f"{base}.{name}") is not None:
        return f"{base}.{name}", None
    file = _file(base)
    if file is None:
        raise ValueError(f"flatten: no module {base} in {REPOSITORY}")
    if file.name == "__init__.py":
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if name == (alias.asname or alias.name):
                        return _definition(_absolute(base, node), alias.name)
    return base, name


def _check_packages(text: str, path: Path) -> None:
    for node in ast.walk(ast.parse(text)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        for name in names:
            top = name.split(".")[0]
            if top not in AT_HAND and top not in sys.stdlib_module_names:
                raise ValueError(
                    f"flatten: {path} imports {name}, which an exported model must not need; "
                    f"expected only the standard library and {', '.join(sorted(AT_HAND))}"
                )
