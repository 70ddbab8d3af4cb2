# Every target sets itself up: a fresh machine needs python >= 3.11 with venv, and make.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
JOBS ?= $(shell getconf _NPROCESSORS_ONLN)
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# tests and benchmarks start several processes: one thread each, or they fight for the cores
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false

.PHONY: setup demo test check format lint types levels bench clean

setup: $(READY)

# torch comes first, by exact version: a bare `torch` would pull gigabytes of CUDA where a CPU build is offered
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: export OMP_NUM_THREADS := 2
demo: $(READY)
	$(BIN)/weft demo

test: $(READY)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

check: lint types levels test

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(READY)
	$(BIN)/mypy

levels: $(READY)
	$(BIN)/python -m pytest -q tests/test_levels.py

bench: $(READY)
	$(BIN)/python -m benchmarks.tiny
	$(BIN)/python -m benchmarks.causal_conv --quick
	$(BIN)/python -m benchmarks.adapters --quick
	$(BIN)/python -m benchmarks.decode --quick
	$(BIN)/python -m benchmarks.mmfs --quick
	$(BIN)/python -m benchmarks.data --quick
	$(BIN)/python -m benchmarks.metrics

clean:
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
