"""The product's modules as flat files."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from copy import deepcopy

import pytest
import torch

from fvlm.hub.flatten import AT_HAND, flatten


@pytest.fixture(scope="module")
def files() -> dict[str, str]:
    return flatten()


def imports(text: str) -> list[tuple[int, str]]:
    """(dots, module) of everything a file imports, wherever in it."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or ""))
    return found


def test_files_import_each_other_and_what_every_reader_has(files):
    for name, text in files.items():
        for dots, module in imports(text):
            if dots:
                assert dots == 1, name
                assert f"{module}.py" in files, f"{name} imports {module}"
            else:
                top = module.split(".")[0]
                assert top in AT_HAND or top in sys.stdlib_module_names, f"{name} imports {module}"
    assert not any(
        "fvlm.kernels" in module or "triton" in module for text in files.values() for _, module in imports(text)
    )


def test_transformers_loader_finds_every_file_by_its_pattern(files):
    """It follows `from .name import`, and copies nothing else."""
    reached, waiting = set(), ["configuration_fvlm", "modeling_fvlm", "processing_fvlm"]
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += re.findall(r"^\s*from\s+\.(\S+)\s+import", files[f"{name}.py"], flags=re.MULTILINE)
    assert {f"{name}.py" for name in reached} == set(files)


def test_what_is_published_is_the_products_own_text(files, repo_root):
    """Every definition, but for the names of modules, stands in the product as it stands in the file."""
    compared = 0
    for text in files.values():
        origin = re.match(r"# Written by launch/export.py from (\S+); to be changed there", text).group(1)
        source = (repo_root / origin).read_text(encoding="utf-8")
        renamed = re.findall(r"\b(\w+) as (\w+)_\1\b", text)
        for node in ast.parse(text).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Assign)):
                segment = ast.get_source_segment(text, node)
                for name, module in renamed:
                    segment = re.sub(rf"\b{module}_{name}\b", f"{module}.{name}", segment)
                lines = [line for line in segment.splitlines() if "import" not in line]
                assert all(line in source for line in lines), f"{origin}: {node}"
                compared += 1
    assert compared > 100


def test_names_of_modules_become_names_of_functions(files):
    assert "convert_locate(path)" in files["model_base.py"]
    assert re.search(
        r"^from \.model_convert import .*\blocate as convert_locate\b", files["model_base.py"], re.MULTILINE
    )


def test_only_what_is_needed_is_there(files):
    assert "frame_offsets" in files["kernels_query_attention_op.py"]
    assert "custom_op" not in "".join(files.values())
    assert "FVLM_KERNELS" not in "".join(files.values())
    assert "simplejpeg" not in files["data_video.py"]
    assert "def read_media" in files["data_video.py"]
    assert "AttentionInterface.register(ATTENTION, _attention)" in files["model_base.py"]
    assert "Image.init()" in files["data_picture.py"]


def test_what_cannot_be_flattened_is_refused():
    with pytest.raises(ValueError, match=r"video\.py imports simplejpeg, which an exported model must not need"):
        flatten({"fvlm.data.video": ("encode_jpeg",)})
    with pytest.raises(ValueError, match=r"base\.py defines no Nothing"):
        flatten({"fvlm.model.base": ("Nothing",)})
    with pytest.raises(ValueError, match=r"no module fvlm\.model\.nowhere"):
        flatten({"fvlm.model.nowhere": ("Nothing",)})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("from . import other\n\ndef f():\n    return [other]\n", "uses the module other as a value"),
        ("def f():\n    from . import other\n    return other.g()\n", "line 2: import names from fvlm.other here"),
        ("import fvlm.other\n\ndef f():\n    return fvlm.other.g()\n", "imports fvlm.other"),
        ("from . import other\n\ndef f():\n    return (other\n        .g())\n", "other.g is not in one piece"),
        ("def f():\n    import yaml\n    return yaml\n", "imports yaml"),
    ],
)
def test_ways_to_import_that_have_no_flat_form_are_refused(tmp_path, monkeypatch, text, message):
    (tmp_path / "fvlm").mkdir()
    (tmp_path / "fvlm" / "one.py").write_text(text)
    (tmp_path / "fvlm" / "other.py").write_text("def g():\n    return 1\n")
    monkeypatch.setattr("fvlm.hub.flatten.REPOSITORY", tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)):
        flatten({"fvlm.one": ("f",)})


def test_flat_files_compute_what_the_modules_do(tmp_path, monkeypatch):
    (tmp_path / "fvlm" / "deep").mkdir(parents=True)
    (tmp_path / "fvlm" / "one.py").write_text(
        "from . import other\nfrom .deep import h as deepest\n\n# kept with what follows\nASIDE = 3\n\n\n"
        "def f():\n    from .other import LATE\n    return 'é', other.g() + other.g(), deepest(), LATE\n"
    )
    (tmp_path / "fvlm" / "other.py").write_text(
        "LATE = 5\n'''Its docstring.'''\nUNUSED = 1\n\ndef g():\n    return 1\n"
    )
    (tmp_path / "fvlm" / "deep" / "__init__.py").write_text("from .inner import h\n")
    (tmp_path / "fvlm" / "deep" / "inner.py").write_text("def h():\n    return 'deep'\n")
    monkeypatch.setattr("fvlm.hub.flatten.REPOSITORY", tmp_path)
    files = flatten({"fvlm.one": ("f",)})
    assert sorted(files) == ["deep_inner.py", "one.py", "other.py"]
    assert "ASIDE" not in files["one.py"]
    assert "UNUSED" not in files["other.py"]
    assert "Its docstring." in files["other.py"]
    (tmp_path / "flat_package").mkdir()
    for name, text in {"__init__.py": "", **files}.items():
        (tmp_path / "flat_package" / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    assert importlib.import_module("flat_package.one").f() == ("é", 2, "deep", 5)


def test_beside_a_copy_of_it_the_product_keeps_its_own_attention(files, model, tmp_path, monkeypatch):
    """Whoever exports and loads the folder in one process: transformers looks the attention up by its name."""
    (tmp_path / "exported_copy").mkdir()
    for name, text in {"__init__.py": "", **files}.items():
        (tmp_path / "exported_copy" / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    stranger = importlib.import_module("exported_copy.modeling_fvlm").FoveatedModel(deepcopy(model.config)).eval()
    stranger.load_state_dict(model.state_dict())
    used = []

    def watch(name: str) -> None:
        module = importlib.import_module(name)
        attend = module.varlen_attention
        monkeypatch.setattr(module, "varlen_attention", lambda *rows: used.append(name) or attend(*rows))

    modules = {"fvlm.model.base": model, "exported_copy.model_base": stranger}
    for name in modules:
        watch(name)
    torch.manual_seed(0)
    inputs = {"frames": torch.rand(1, 2, 3, 56, 56), "input_ids": torch.randint(3, 800, (1, 5))}
    logits = []
    for name, each in modules.items():
        used.clear()
        with torch.no_grad():
            logits.append(each(**inputs).logits)
        assert set(used) == {name}
    torch.testing.assert_close(*logits)
