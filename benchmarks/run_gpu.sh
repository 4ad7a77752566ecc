#!/usr/bin/env bash
# What a GPU should measure, in parts of at most eight minutes.
#
#   benchmarks/run_gpu.sh                       every part, results in benchmarks/results/gpu
#   OUT=/tmp/out benchmarks/run_gpu.sh tests    one part, results elsewhere
#   benchmarks/run_gpu.sh --rehearse            all of it, tiny, on the CPU: shows that it works, times mean nothing
#
# Parts: tests, kernels-tune, kernels. A part whose OUT/<part>.json is there is skipped, so the same command goes on
# where an earlier one stopped; what a part left when it failed is OUT/<part>.incomplete.json. Tiles that were found by
# kernels-tune are put into kernels/tuned, where the kernels look for them. Environment: OUT, PYTHON, LIMIT (seconds a
# part, 480), FVLM_COMMIT (what results should name as the commit where there is no git). Exit code 1 if a part failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

PARTS=(tests kernels-tune kernels)
REHEARSE=()
ASKED=()
for argument in "$@"; do
    case $argument in
        -h | --help) sed -n '2,12s/^# \{0,1\}//p' benchmarks/run_gpu.sh; exit 0 ;;
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
mkdir -p "$OUT"
cores=$(nproc)
processes=$((cores > 16 ? 8 : cores > 2 ? cores / 2 : 1))

# What a part runs; it writes the file it is given.
part() {
    case $1 in
        tests)
            local what=(tests/kernels -q -p no:cacheprovider)
            [ ${#REHEARSE[@]} -eq 0 ] || what=(tests/kernels/test_dispatch.py -q -p no:cacheprovider)
            ! "$PYTHON" -c "import xdist" 2>/dev/null || what+=(-n "$processes")
            timeout "$LIMIT" "$PYTHON" -m benchmarks.gpu_tests --json "$2" "${what[@]}" ;;
        kernels-tune) timeout "$LIMIT" "$PYTHON" -m benchmarks.kernels --tune --json "$2" "${REHEARSE[@]}" ;;
        kernels) timeout "$LIMIT" "$PYTHON" -m benchmarks.kernels --json "$2" "${REHEARSE[@]}" ;;
    esac
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
for name in "${ASKED[@]}"; do
    result=$OUT/$name.json
    if [ -f "$result" ]; then
        echo "== $name: $result is there, skipped"
        continue
    fi
    use_tuned_tiles || { failed+=("$name"); continue; }
    echo "== $name"
    start=$SECONDS
    if part "$name" "$OUT/$name.incomplete.json" | tee "$OUT/$name.txt"; then
        mv "$OUT/$name.incomplete.json" "$result"
        echo "== $name: done in $((SECONDS - start)) s"
    else
        failed+=("$name")
        echo "== $name: failed after $((SECONDS - start)) s" >&2
    fi
done
use_tuned_tiles || failed+=(kernels-tune)
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}" >&2; exit 1; }
