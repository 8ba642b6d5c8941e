# Two commands are all a newcomer needs: `make demo` and `make test`. Both set everything up first.

VENV ?= .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.m1jax-setup
SGLANG_VENV ?= .venv-sglang
SGLANG_STAMP := $(SGLANG_VENV)/.m1jax-setup
SGLANG_LISTS := m1jax/serving/cpu/requirements.txt m1jax/serving/cpu/requirements-no-deps.txt
# Two workers fill a small machine; the compiled programs are kept, so that the second run is quicker.
PYTEST := JAX_PLATFORMS=cpu $(RUN) -m pytest -n 2 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-heavy sglang-env sglang-test lint format study bench bench-kernels

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

setup: $(STAMP)  ## virtual environment in $(VENV); PYTHON=/path/to/python and VENV=folder override

demo: setup  ## SFT, then CISPO, then the before/after table: some ten minutes on two cores
	$(RUN) -m experiments.demo.run --workdir=runs/demo

test: setup  ## the fast suite; TESTS="file ..." for a part of it
	$(PYTEST) -m "not slow and not heavy and not gpu and not sglang" $(TESTS)

test-slow: setup  ## the tests that take longer
	$(PYTEST) -m "slow and not gpu and not sglang"

test-heavy: setup  ## more losses, splits, devices and meshes than CI has time for
	$(PYTEST) -m heavy

sglang-env: $(SGLANG_STAMP)  ## an SGLang server for CPUs in $(SGLANG_VENV), 3 GB; SGLANG_VENV=folder overrides

sglang-test: setup sglang-env  ## the tests that start real SGLang servers, one after another
	JAX_PLATFORMS=cpu SGLANG_VENV=$(SGLANG_VENV) $(RUN) -m pytest -m sglang

lint: setup  ## format, rules, types, shell scripts
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(VENV)/bin/shellcheck launch/*.sh .ci/run
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(RUN) -m pyright --pythonpath $(RUN)

format: setup  ## put the code into the form that lint asks for
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

study: setup  ## CISPO, DAPO and GRPO over seeds, tuning included: one to two hours on two cores
	$(RUN) -m experiments.cispo_vs_dapo_vs_grpo.run --phase=tune
	$(RUN) -m experiments.cispo_vs_dapo_vs_grpo.run
	$(RUN) -m experiments.cispo_vs_dapo_vs_grpo.table --results=runs/cispo_vs_dapo_vs_grpo/results

bench: setup  ## seconds by stage, lightning core against length, tokens per second
	$(RUN) -m experiments.bench

bench-kernels: setup  ## kernels against the roofline and their peers: CPU, GPU or TPU
	$(RUN) -m experiments.bench.kernels

# Made again when pyproject.toml changes. Python 3.11 is tried first: the numbers in the READMEs come from it.
$(STAMP): pyproject.toml
	@set -eu; \
	new_enough='import sys; sys.exit(sys.version_info < (3, 11))'; \
	python=''; \
	for candidate in $(or $(PYTHON),python3.11 python3.12 python3); do \
	    if "$$candidate" -c "$$new_enough" 2>/dev/null; then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	    echo "m1jax needs Python 3.11 or newer, found none; install it, or name one: make setup PYTHON=/path/to/python3" >&2; \
	    exit 2; \
	fi; \
	extras='.[test,dev]'; \
	echo "setting up $(VENV) with $$("$$python" --version); minutes the first time"; \
	if command -v uv >/dev/null 2>&1; then \
	    "$(RUN)" -c "$$new_enough" 2>/dev/null || uv venv --quiet --seed --clear --python "$$("$$python" -c 'import sys; print(sys.executable)')" "$(VENV)"; \
	    uv pip install --quiet --python "$(RUN)" -e "$$extras"; \
	else \
	    "$(RUN)" -c "$$new_enough" 2>/dev/null || "$$python" -m venv --clear "$(VENV)"; \
	    "$(RUN)" -m pip install --quiet --disable-pip-version-check -e "$$extras"; \
	fi; \
	touch "$@"

# Python 3.11 first again: the lists were run together with it, and sglang has a wheel for each Python.
$(SGLANG_STAMP): pyproject.toml $(SGLANG_LISTS)
	@set -eu; \
	python=''; \
	for candidate in $(or $(PYTHON),python3.11 python3.12); do \
	    if "$$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null; then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	    echo "an SGLang server needs Python 3.11 or 3.12, found neither; name one: make sglang-env PYTHON=/path/to/python3" >&2; \
	    exit 2; \
	fi; \
	echo "setting up $(SGLANG_VENV) with $$("$$python" --version); minutes and 3 GB the first time"; \
	pip="$(SGLANG_VENV)/bin/python -m pip install --quiet --disable-pip-version-check"; \
	[ -x "$(SGLANG_VENV)/bin/python" ] || "$$python" -m venv "$(SGLANG_VENV)"; \
	$$pip -r m1jax/serving/cpu/requirements.txt; \
	$$pip --no-deps -r m1jax/serving/cpu/requirements-no-deps.txt; \
	$$pip --no-deps -e .; \
	touch "$@"
