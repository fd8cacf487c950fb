#!/usr/bin/env bash
# Everything that a GPU is needed for, in one go and without a network: build in place, test, sanitize, measure.
#
#   scripts/gpu_check.sh [stage...]     stages: build test triton sanitize bench; all of them by default
#
# A stage takes minutes at most and can be run alone. PYTHON names the interpreter that has torch for CUDA. Benchmarks
# append rows to benchmarks/results/gpu.csv. A stage that fails does not stop the next, except the build.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
stages=("$@")
((${#stages[@]})) || stages=(build test triton sanitize bench)
summary=()
status=0
operator_tests=(tests/ops/test_{visual_focus,visual_weights,policy_loss,vgpo_loss,operators,attention_mass}.py
    tests/ops/test_{linear_logprob,lm_head,linear_vgpo_loss}.py)

wanted() { [[ " ${stages[*]} " == *" $1 "* ]]; }

stage() {  # name, seconds it may take, command...
    local name=$1 limit=$2 start=$SECONDS code=0
    shift 2
    printf '\n======== %s ========\n' "$name"
    timeout --kill-after=5 "$limit" "$@" || code=$?
    if ((code == 0)); then
        summary+=("$name: passed in $((SECONDS - start)) s")
    else
        summary+=("$name: FAILED with code $code after $((SECONDS - start)) s")
        status=1
    fi
    return "$code"
}

finish() {
    printf '\n'
    printf '%s\n' "${summary[@]}"
    exit "$status"
}

sanitize() {  # tool
    local sanitizer log
    sanitizer=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
    if [ ! -x "$sanitizer" ]; then
        summary+=("$1: skipped, there is no compute-sanitizer")
        return
    fi
    log=$(mktemp)
    # Without torch's cache every tensor is an allocation of its own, so that an overrun cannot land in another.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 stage "$1" 100 "$sanitizer" --tool "$1" --error-exitcode 1 \
        "$PYTHON" scripts/gpu_small_cases.py > "$log" 2>&1
    tail -n 30 "$log"
    if grep -q "Device not supported" "$log"; then
        unset 'summary[-1]'
        summary+=("$1: skipped, compute-sanitizer does not support this device here")
        status=$previous_status
    fi
    rm -f "$log"
}

"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    echo "gpu_check: $PYTHON has no torch that sees a GPU" >&2
    exit 1
}
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader

if wanted build; then
    VGPO_BUILD=cuda stage build 300 "$PYTHON" setup.py build_ext --inplace || finish
fi

if wanted test; then
    # Tests of the operators on the GPU's backends; what needs no GPU is left to `make test`.
    VGPO_TEST_BACKENDS=reference,cuda stage test 240 "$PYTHON" -m pytest -q --maxfail=20 \
        -p no:cacheprovider tests/cuda/test_cuda_gpu.py "${operator_tests[@]}"
fi

if wanted triton; then
    # The same tests. Every combination of options is a kernel of its own, some 200 to compile the first time.
    VGPO_TEST_BACKENDS=triton stage triton 400 "$PYTHON" -m pytest -q --maxfail=20 \
        -p no:cacheprovider "${operator_tests[@]}"
fi

if wanted sanitize; then
    previous_status=$status
    stage "small cases" 60 "$PYTHON" scripts/gpu_small_cases.py
    for tool in memcheck racecheck; do
        previous_status=$status
        sanitize "$tool"
    done
fi

if wanted bench; then
    stage bench 480 "$PYTHON" benchmarks/gpu.py
fi

finish
