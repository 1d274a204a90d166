# Two commands from a fresh machine with Python 3.10 or newer: `make demo` and `make test`.
#   PYTHON=python3.12 make test          another interpreter for the virtual environment
#   make test PYTEST_ARGS="-k config -x" arguments for pytest
#   make demo DEMO_ARGS="--seed 1"       overrides for `grade demo`

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
DEMO_ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test test-main test-kernels test-portable quick check format clean

help:
	@echo "make demo           install into $(VENV) and train a tiny model from scratch to a better one (DEMO_ARGS)"
	@echo "make test           install into $(VENV) and run the tests (PYTEST_ARGS)"
	@echo "make test-portable  of these, those that rounding could upset, with other kernels of the libraries"
	@echo "make quick          of these, those that need no whole run: a minute and a half for daily work"
	@echo "make check          format, lint, types, and make quick"
	@echo "make format         rewrite the files as ruff format writes them"
	@echo "make install        only install into $(VENV)"
	@echo "make clean          remove $(VENV), caches and build files (not runs/)"

install: $(STAMP)

# The stamp is the last thing written, so an installation that was cut short is repeated, and a finished one is
# not, until what it was made from changes. Both packages: an unpacked source distribution would install its own.
$(STAMP): setup.py constraints.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	GRADE_DISTRIBUTION=both $(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/python -m grade demo $(DEMO_ARGS)

# Two processes at once, because Triton decides when it is imported whether its kernels are compiled or interpreted; each
# takes half of the cores. What interprets is the shorter, so files that share no long fixture with the rest go after it.
# Status 5 means that PYTEST_ARGS selected no test there.
APART = tests/kernels/test_aot.py tests/benchmarks/test_training_benchmark.py tests/sampling/test_compiled_decoding.py \
    tests/memory tests/commands tests/report
test: $(STAMP)
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$$($(BIN)/python -c 'import os; print(max(1, os.cpu_count() // 2))')} \
	    $(MAKE) --no-print-directory -k -j 2 test-main test-kernels

test-main: $(STAMP)
	$(BIN)/python -m pytest $(addprefix --ignore ,$(APART)) $(PYTEST_ARGS)

test-kernels: $(STAMP)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/kernels $(PYTEST_ARGS) || [ $$? -eq 5 ]
	$(BIN)/python -m pytest $(APART) $(PYTEST_ARGS) || [ $$? -eq 5 ]
	@$(MAKE) --no-print-directory test-portable

# The libraries take other kernels, and so round otherwise, on a processor with AVX2 only. These make them do so anywhere.
PORTABLE = tests/sampling/test_decoding.py tests/sampling/test_rollout.py tests/replay $(addprefix tests/methods/test_,policy_gradient_steps.py methods_bandit.py)
test-portable: $(STAMP)
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_CBWR=COMPATIBLE \
	    $(BIN)/python -m pytest $(PORTABLE) $(PYTEST_ARGS) || [ $$? -eq 5 ]

# What tells a mistake soonest: settings, data, losses, kernels; runs and studies are left to `make test`.
QUICK = $(addprefix tests/,test_architecture.py test_errors.py test_files.py test_jsonl.py test_pages.py test_seeds.py \
    config/test_config.py tasks rewards/test_base.py rewards/test_weighted.py methods/test_policy_gradient_losses.py \
    $(addprefix kernels/test_,kl.py logprob.py scatter.py bad_inputs.py))
quick: $(STAMP)
	$(BIN)/python -m pytest -m "not slow" $(QUICK) $(PYTEST_ARGS)

check: $(STAMP)
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy
	@$(MAKE) --no-print-directory quick

format: $(STAMP)
	$(BIN)/python -m ruff format .
	$(BIN)/python -m ruff check --fix .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis .benchmarks .ruff_cache
	find grade grade_kernels tests -name __pycache__ -type d -prune -exec rm -rf {} +
