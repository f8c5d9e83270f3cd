# make quickstart   train a small GPT on real text, generate from it, plot the loss
# make test         run the tests
# make help         all targets
#
# Everything happens in .venv, which is made if it is missing. TORCH says which torch is installed first, for example
#   make test TORCH=torch==2.13.0
# PYTHON says which interpreter makes .venv (default python3).

PYTHON ?= python3
VENV ?= .venv
TORCH ?=
BIN := $(VENV)/bin
WORKERS ?= 2

export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help quickstart install test check format clean

help:  ## show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

quickstart: $(VENV)/.installed  ## train a tokenizer and a small GPT on real text, generate, plot the loss
	$(BIN)/litgpt quickstart

install: $(VENV)/.installed  ## make .venv and install litgpt into it, with all that its commands need

test: $(VENV)/.installed-tests  ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)

check: $(VENV)/.installed-tests  ## formatting, lint, import graph
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python .ci/house.py

format: $(VENV)/.installed-tests  ## format and repair what ruff can repair
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove .venv and caches
	rm -rf $(VENV) .pytest_cache .ruff_cache build *.egg-info

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("litgpt needs Python 3.10 or newer, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)

# torch comes first and by itself, so that TORCH decides which one it is. Without TORCH any torch that is new enough does.
$(VENV)/.torch: $(BIN)/python
	$(BIN)/python -m pip install $(if $(TORCH),"$(TORCH)","torch>=2.10")
	touch $@

# The stamps are older than pyproject.toml after it has changed: then, and only then, pip runs again.
$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --editable ".[plot]"
	touch $@

$(VENV)/.installed-tests: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --editable ".[test]"
	touch $@ $(VENV)/.installed
