#!/usr/bin/env bash
# What a GPU should measure, in parts of at most eight minutes.
#
#   benchmarks/run_gpu.sh                       every part, results in benchmarks/results/gpu
#   OUT=/tmp/out benchmarks/run_gpu.sh tests    one part, results elsewhere
#   benchmarks/run_gpu.sh --rehearse            all of it, tiny, on the CPU: shows that it works, times mean nothing
#
# Parts, those that tell most first: tests, throughput-135m-stage2, profile-135m, throughput-1b7-stage2, memory-1b7 (the
# configuration of a 32 GB card, 30 GiB of which torch may take), throughput-135m-dpo, kernels-tune, kernels,
# budget-135m, ladder-135m-stage2, generation. Half an hour of a GPU, ten minutes at a time, goes far in three calls:
#   run_gpu.sh tests throughput-135m-stage2 profile-135m       (the figures, and where the time goes)
#   run_gpu.sh throughput-1b7-stage2 throughput-135m-dpo       (the other two figures)
#   run_gpu.sh kernels-tune budget-135m                        (what to change for the next half hour)
# with LIMIT=180 to 300, since all parts together may take that long.
#
# A part whose OUT/<part>.json is there is skipped, so the same command goes on where an earlier one stopped; what a
# part left when it failed is OUT/<part>.incomplete.json. Tiles that were found by kernels-tune are put into
# kernels/tuned, where the kernels look for them. A machine without a network, and without DeepSpeed, takes what it
# lacks from build/gpu_wheels, which benchmarks/gpu_wheels.sh fills beforehand, elsewhere.
#
# Environment: OUT, PYTHON, LIMIT (seconds a part, 480), WHEELS and SITE (what to install, and where to),
# FVLM_COMMIT (what results should name as the commit where there is no git). Exit code 1 if a part failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

PARTS=(tests throughput-135m-stage2 profile-135m throughput-1b7-stage2 memory-1b7 throughput-135m-dpo kernels-tune
    kernels budget-135m ladder-135m-stage2 generation)
REHEARSE=()
ASKED=()
for argument in "$@"; do
    case $argument in
        -h | --help) sed -n '2,22s/^# \{0,1\}//p' benchmarks/run_gpu.sh; exit 0 ;;
        --rehearse) REHEARSE=(--rehearse) ;;
        *)
            [[ " ${PARTS[*]} " == *" $argument "* ]] || { echo "unknown part $argument: expected ${PARTS[*]}" >&2; exit 2; }
            ASKED+=("$argument") ;;
    esac
done
[ ${#ASKED[@]} -gt 0 ] || ASKED=("${PARTS[@]}")

PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
OUT=${OUT:-benchmarks/results/gpu}
LIMIT=${LIMIT:-480}
WHEELS=${WHEELS:-build/gpu_wheels}
SITE=$(realpath -m "${SITE:-build/gpu_site}")
mkdir -p "$OUT"
cores=$(nproc)
processes=$((cores > 16 ? 8 : cores > 2 ? cores / 2 : 1))

# Python's module $1 with the arguments after it, and with those behind -- instead where this is a rehearsal.
measure() {
    local module=$1 given=() instead=() tiny=0
    shift
    for argument in "$@"; do
        if [ "$argument" = -- ]; then tiny=1; elif [ $tiny = 1 ]; then instead+=("$argument"); else given+=("$argument"); fi
    done
    [ ${#REHEARSE[@]} -eq 0 ] || given=("${instead[@]}")
    timeout "$LIMIT" "$PYTHON" -m "benchmarks.$module" --json "$file" "${given[@]}"
}

# What a part runs; it writes $file.
part() {
    local file=$2 small=(--model tiny --steps 1 --samples 96) packs=(data.tokens=512 train.packs_per_step=1)
    case $1 in
        tests)
            local what=(tests/kernels tests/benchmarks/test_counters.py tests/train/test_steady_state.py
                tests/data/test_loader.py)
            [ ${#REHEARSE[@]} -eq 0 ] || what=(tests/kernels/test_dispatch.py)
            what+=(-q -p no:cacheprovider)
            ! "$PYTHON" -c "import xdist" 2>/dev/null || what+=(-n "$processes")
            timeout "$LIMIT" "$PYTHON" -m benchmarks.gpu_tests --json "$file" "${what[@]}" ;;
        kernels-tune) timeout "$LIMIT" "$PYTHON" -m benchmarks.kernels --tune --json "$file" "${REHEARSE[@]}" ;;
        kernels) timeout "$LIMIT" "$PYTHON" -m benchmarks.kernels --json "$file" "${REHEARSE[@]}" ;;
        throughput-*)
            local model mix
            IFS=- read -r _ model mix <<<"$1"
            measure throughput --model "$model" --mix "$mix" -- "${small[@]}" --mix "$mix" --tokens 512 ;;
        ladder-135m-stage2)
            measure throughput --ladder -- --ladder --rungs naive packed product "${small[@]}" --tokens 512 ;;
        profile-135m)
            measure profile --out "$OUT/profile-135m" -- "${small[@]}" --out "$OUT/profile-135m" "${packs[@]}" ;;
        memory-1b7)
            OMP_NUM_THREADS=$cores measure memory --model 1b7 --zero zero2_offload --tokens 8192 --frames 180 \
                --checkpointing 1 --limit 30 --packs 1 --steps 100 --seconds $((LIMIT * 3 / 4)) -- \
                --model tiny --zero zero2_offload --tokens 256 --frames 4 --checkpointing 1 --packs 1 ;;
        budget-135m)
            measure budget -- "${small[@]}" --zero zero0 --limit 0.1 --grain 512 --largest 512 --step-tokens 512 ;;
        generation) measure generation -- --lengths 40 --batch 2 --frames 4 --runs 1 ;;
    esac
}

# DeepSpeed and what else is missing, from the wheels that were brought along.
install_what_is_missing() {
    local needed="deepspeed, webdataset, simplejpeg, av, transformers, matplotlib, pyarrow, yaml, tqdm"
    export PYTHONPATH="$SITE${PYTHONPATH:+:$PYTHONPATH}"
    "$PYTHON" -c "
import sys
from importlib.util import find_spec
missing = [name for name in '$needed'.split(', ') if find_spec(name) is None]
if missing:
    sys.exit('missing here: ' + ', '.join(missing))" && return
    compgen -G "$WHEELS/*.whl" >/dev/null ||
        { echo "error: no wheels in $WHEELS: run benchmarks/gpu_wheels.sh where there is a network" >&2; return 1; }
    echo "== installing $WHEELS into $SITE"
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$SITE" "$WHEELS"/*.whl &&
        "$PYTHON" -c "import $needed"
}

# The tiles of this GPU model, found now or by an earlier call, where kernels look for them.
use_tuned_tiles() {
    [ -f "$OUT/kernels-tune.json" ] && [ ${#REHEARSE[@]} -eq 0 ] || return 0
    local name
    name=$("$PYTHON" -c "
import torch
from fvlm.kernels.launching import gpu_slug
print(gpu_slug(torch.cuda.get_device_name()))") || return 1
    mkdir -p kernels/tuned && cp "$OUT/kernels-tune.json" "kernels/tuned/$name.json"
}

failed=()
installed=unknown
for name in "${ASKED[@]}"; do
    result=$OUT/$name.json
    if [ -f "$result" ]; then
        echo "== $name: $result is there, skipped"
        continue
    fi
    if [ $installed = unknown ]; then
        installed=yes
        install_what_is_missing || installed=no # parts that need none of it go on
    fi
    use_tuned_tiles || { failed+=("$name"); continue; }
    echo "== $name"
    start=$SECONDS
    if part "$name" "$OUT/$name.incomplete.json" | tee "$OUT/$name.txt"; then
        for written in "$OUT/$name.incomplete."*; do mv "$written" "${written/.incomplete./.}"; done
        echo "== $name: done in $((SECONDS - start)) s"
    else
        failed+=("$name")
        echo "== $name: failed after $((SECONDS - start)) s" >&2
    fi
done
use_tuned_tiles || failed+=(kernels-tune)
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}" >&2; exit 1; }
