"""Rules of the house that a machine can check."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile

LIMIT = 400
ORDER = ["fvlm.kernels", "fvlm.model", "fvlm.data", "fvlm.train", ("fvlm.research", "fvlm.hub", "fvlm.evaluate")]


def listed_files(root, *patterns):
    """Files that are tracked, or new and not ignored."""
    command = ["git", "ls-files", "-co", "--exclude-standard", *patterns]
    names = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.splitlines()
    return [name for name in names if (root / name).exists()]


def python_files(root):
    return [root / name for name in listed_files(root, "*.py")]


def test_no_file_is_longer_than_a_sitting(repo_root):
    long = {
        str(f.relative_to(repo_root)): n
        for f in python_files(repo_root)
        if (n := len(f.read_text().splitlines())) > LIMIT
    }
    assert long == {}


def test_kernels_is_a_link_without_init_and_hugging_faces_package_still_works(repo_root):
    assert (repo_root / "fvlm" / "kernels").is_symlink()
    assert not (repo_root / "kernels" / "__init__.py").exists()
    code = (
        "import kernels, fvlm.kernels.varlen_attention; from transformers import LlamaForCausalLM; "
        "assert hasattr(kernels, 'get_kernel'), kernels"
    )
    subprocess.run([sys.executable, "-c", code], cwd=repo_root, check=True)


def test_nothing_imports_the_kernels_folder_by_its_own_name(repo_root):
    pattern = re.compile(r"^\s*(import kernels|from kernels)\b", re.M)
    assert [f for f in python_files(repo_root) if pattern.search(f.read_text())] == []


def test_only_the_engine_imports_deepspeed(repo_root):
    pattern = re.compile(r"^\s*(import deepspeed|from deepspeed)", re.M)
    users = [
        f.relative_to(repo_root).as_posix() for f in python_files(repo_root / "fvlm") if pattern.search(f.read_text())
    ]
    assert users == ["fvlm/train/engine.py"]


def test_imports_run_one_way(repo_root):
    """Each layer imports itself and what lies below; configuration stands beside training."""
    below: dict[str, set[str]] = {}
    seen: set[str] = set()
    for layer in ORDER:
        names = {layer} if isinstance(layer, str) else set(layer)
        seen |= names
        below.update({name: set(seen) for name in names})
    wrong = []
    for file in python_files(repo_root):
        parts = file.relative_to(repo_root).with_suffix("").parts
        layer = "fvlm.kernels" if parts[0] == "kernels" else ".".join(parts[:2])
        if layer not in below:
            continue
        for target in re.findall(r"^\s*(?:from|import) (fvlm\.\w+)", file.read_text(), re.M):
            if target in {name for names in below.values() for name in names} and target not in below[layer]:
                wrong.append(f"{'/'.join(parts)} imports {target}")
    assert wrong == []


def test_the_wheel_carries_the_kernels_and_their_tuned_tiles(repo_root, tmp_path):
    """Built from tracked files alone, unpacked elsewhere, imported without the checkout."""
    source = tmp_path / "source"
    for name in listed_files(repo_root, "fvlm", "kernels", "setup.py", "pyproject.toml", "README.md"):
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(repo_root / name, target, follow_symlinks=False)
    (source / "kernels" / "tuned").mkdir(exist_ok=True)
    (source / "kernels" / "tuned" / "some-gpu.json").write_text('{"tiles": {}}')
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(source),
    ]
    subprocess.run(build, check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); import fvlm.model, fvlm.kernels.launching as l; "
        f"assert l.__file__.startswith({str(tmp_path)!r}), l.__file__; assert (l.TUNED / 'some-gpu.json').exists()"
    )
    subprocess.run([sys.executable, "-I", "-c", code], check=True, cwd=tmp_path)
