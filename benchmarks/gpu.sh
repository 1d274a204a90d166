#!/usr/bin/env bash
# Everything that needs a GPU, in one call of less than eight minutes: see benchmarks/gpu/__main__.py, or --help.
# Environment: PYTHON, the interpreter (python3); OUT, the folder of the results; DRY_RUN=1, toys on a CPU.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 16
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
exec "${PYTHON:-python3}" -m benchmarks.gpu "$@"
