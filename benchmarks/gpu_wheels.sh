#!/usr/bin/env bash
# What a GPU machine without a network may lack, as wheels in build/gpu_wheels, for benchmarks/run_gpu.sh to install.
#
#   benchmarks/gpu_wheels.sh                       for Python 3.12 on x86-64
#   TARGET=3.11 benchmarks/gpu_wheels.sh wandb     for another Python, with wandb too
#
# Run it where there is a network and fvlm is installed. The list is setup.py's install_requires, and what these
# require, without what an image for torch and transformers brings (HAS) and wandb, which is imported when asked for;
# versions are those installed here. DeepSpeed has no wheel: it is built without its compiled operators, which it
# compiles where and when they are used. Environment: PYTHON, TARGET (3.12), HAS (names, to replace the list below),
# WHEELS (build/gpu_wheels).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case ${1:-} in -h | --help) sed -n '2,11s/^# \{0,1\}//p' benchmarks/gpu_wheels.sh; exit 0 ;; esac
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
TARGET=${TARGET:-3.12}
HAS=${HAS:-torch triton transformers tokenizers huggingface-hub safetensors numpy pillow pyyaml pyarrow aiohttp tqdm
    matplotlib packaging psutil einops msgpack ninja py-cpuinfo typing-extensions}
FOLDER=${WHEELS:-build/gpu_wheels}
MOST=60 # MB

wanted=$("$PYTHON" - "$HAS" "$@" <<'PY'
import ast
import re
import sys
from importlib import metadata


def plain(requirement):
    """(name, whether it is asked for without conditions)"""
    name = re.match(r"[\w.-]+", requirement).group().lower().replace("_", "-")
    return name, "extra ==" not in requirement


tree = ast.parse(open("setup.py", encoding="utf-8").read())
keywords = {k.arg: k.value for n in ast.walk(tree) if isinstance(n, ast.Call) for k in n.keywords}
left = [plain(text)[0] for text in ast.literal_eval(keywords["install_requires"])] + sys.argv[2:]
has = {name.lower() for name in sys.argv[1].split()} | ({"wandb"} - set(sys.argv[2:]))
found = {}
while left:
    name = left.pop()
    if name in has or name in found:
        continue
    found[name] = metadata.version(name)
    left += [needed for needed, asked in map(plain, metadata.requires(name) or ()) if asked]
print("\n".join(f"{name}=={version}" for name, version in sorted(found.items())))
PY
)
echo "$wanted"

rm -rf "$FOLDER"
mkdir -p "$FOLDER"
platforms=()
for glibc in 28 27 24 17; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
for requirement in $wanted; do
    if [[ $requirement == deepspeed==* ]]; then
        DS_BUILD_OPS=0 "$PYTHON" -m pip wheel -q --no-deps --no-build-isolation -w "$FOLDER" "$requirement"
    else
        "$PYTHON" -m pip download -q --no-deps --only-binary=:all: --implementation cp --python-version "$TARGET" \
            "${platforms[@]}" --platform manylinux2014_x86_64 -d "$FOLDER" "$requirement"
    fi
done

size=$(du -sm "$FOLDER" | cut -f1)
ls -l "$FOLDER"
[ "$size" -le $MOST ] || { echo "error: $FOLDER has $size MB, more than the $MOST MB that should travel" >&2; exit 1; }
echo "$FOLDER: $size MB"
