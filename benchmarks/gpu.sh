#!/usr/bin/env bash
# Everything that needs a GPU, in one call of under ten minutes: the versions, the GPU tests, the benchmarks of the
# kernels and of a training step (random weights in the shape of Qwen3-4B).
#
#   bash benchmarks/gpu.sh                        tests, then all kernels
#   bash benchmarks/gpu.sh --kernel logits_kl     arguments go to python -m benchmarks.kernels
#
# torch and triton must be installed already. Environment:
#   PYTHON=python3        interpreter
#   INSTALL=1             first: pip install --no-deps -e . and pytest, hypothesis, scipy, matplotlib (default: nothing)
#   OUT=DIR               the results go there too: log of the tests, CSV, plot
#   SECONDS_IN_ALL=570    the tests may take a third of it, the training step TRAINING seconds, the kernels the rest
#   TRAINING=240          0 leaves the training step out
#   TESTS="tests"         what pytest runs; TESTS= runs none
#
# A failing test does not stop the benchmarks. Exit status: 0, or the sum of 1 (tests failed, could not run or took
# too long), 2 (a benchmark failed, or an implementation of this package is wrong) and 4 (no GPU: nothing ran).

set -u -o pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 4

python=${PYTHON:-python3}
total=${SECONDS_IN_ALL:-570}
training=${TRAINING:-240}
tests=${TESTS-tests}
results=$(mktemp -d) || exit 4
trap 'rm -rf "$results"' EXIT
begin=$SECONDS
status=0
export PYTHONUNBUFFERED=1
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
unset TRITON_INTERPRET

left() { echo $((total - (SECONDS - begin))); }

keep() { # copies the results to $OUT, if it is set
    if [ -n "${OUT:-}" ]; then
        mkdir -p "$OUT" && cp -r "$results"/. "$OUT"/
    fi
}

if [ "${INSTALL:-0}" = 1 ]; then
    "$python" -m pip install --quiet --no-deps -e . || echo "gpu.sh: the package could not be installed"
    "$python" -m pip install --quiet pytest hypothesis scipy matplotlib || echo "gpu.sh: pip install failed"
fi

echo "== machine"
if command -v nvidia-smi > /dev/null; then nvidia-smi; fi
if command -v rocm-smi > /dev/null; then rocm-smi; fi
"$python" - << 'PYTHON_END' || { echo "gpu.sh: no usable GPU, nothing was run"; exit 4; }
import platform
import sys

import torch

print("python", platform.python_version(), " torch", torch.__version__, " CUDA", torch.version.cuda, " ROCm", torch.version.hip)
try:
    import triton
    print("triton", triton.__version__)
except ImportError as error:
    print("triton:", error)
for i in range(torch.cuda.device_count()):
    print(torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i))
sys.exit(0 if torch.cuda.is_available() else 1)
PYTHON_END

run_tests() { # run_tests ARGUMENTS...: appends to the log; 5 (no test chosen) is no failure
    timeout --kill-after=10 "$((total / 3 - (SECONDS - begin)))" \
        "$python" -m pytest -m gpu -q --continue-on-collection-errors "$@" 2>&1 | tee -a "$results/gpu-tests.log"
    local code=${PIPESTATUS[0]}
    if [ "$code" = 124 ] || [ "$code" = 137 ]; then echo "gpu.sh: the tests took too long"; fi
    [ "$code" = 0 ] || [ "$code" = 5 ] || status=$((status | 1))
}

echo "== tests"
if [ -z "$tests" ]; then
    echo "none asked for"
elif ! "$python" -c "import pytest" 2> /dev/null; then
    echo "gpu.sh: pytest is not installed; INSTALL=1 installs it"
    status=$((status | 1))
elif "$python" -c "import hypothesis, scipy, transformers, peft, datasets, jsonargparse" 2> /dev/null; then
    # shellcheck disable=SC2086 # several paths are several arguments
    run_tests $tests
else
    # tests/conftest.py needs the trainer's libraries; below --confcutdir it is not read.
    echo "gpu.sh: the trainer's libraries are missing: only the tests of the kernels are run"
    run_tests --confcutdir=tests/kernels tests/kernels
fi
keep

echo "== kernels"
# A set-up may begin just before the limit: it gets a margin before it is stopped.
limit=$(($(left) - 45 - training))
if [ "$limit" -lt 30 ]; then limit=30; fi
timeout --kill-after=10 "$((limit + 40))" \
    "$python" -m benchmarks.kernels --device cuda --time-limit "$limit" --out "$results" "$@" 2>&1 |
    tee "$results/gpu-kernels.log"
[ "${PIPESTATUS[0]}" = 0 ] || status=$((status | 2))
keep

train() { # train NAME ARGUMENTS...: a training step, in what time is left
    local name=$1 seconds
    shift
    seconds=$(left)
    if [ "$seconds" -lt 20 ]; then
        echo "gpu.sh: no time is left for the training step $name"
        status=$((status | 2))
        return
    fi
    timeout --kill-after=10 "$seconds" "$python" -m benchmarks.training --shape qwen3-4b --device cuda \
        --dtype bfloat16 --rounds 1 --repeats 5 --seconds 20 --save "$results/$name" "$@" 2>&1 | tee "$results/$name.log"
    [ "${PIPESTATUS[0]}" = 0 ] || status=$((status | 2))
    keep
}

if [ "$training" -gt 0 ]; then
    echo "== training step"
    train training-cuda --batch 16 --lengths 64 --algorithms replay compiled
    train training-cuda-long --batch 8 --lengths 512 2048 --algorithms checkpointed
fi
if [ -z "${OUT:-}" ]; then
    mkdir -p benchmarks/results && cp "$results"/kernels-* "$results"/training-* benchmarks/results/ 2> /dev/null
fi
echo "== results in ${OUT:-benchmarks/results}, $((SECONDS - begin)) s, status $status"
exit "$status"
