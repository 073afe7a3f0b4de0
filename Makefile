# Each target makes its own .venv when missing. Nothing else needs to be installed than Python >= 3.11, git and make.
# An environment that has everything already (no network, say): make bench-gpu BIN=/path/to/env/bin
PYTHON ?= python3
BIN := .venv/bin
PROFILE ?= quick
READY := $(if $(filter .venv/bin,$(BIN)),.venv/.ready)

.PHONY: demo test check bench bench-gpu format clean

demo: $(READY)
	$(BIN)/sparsekd demo --profile $(PROFILE)

test: $(READY)
	$(BIN)/python -m pytest

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python benchmarks/page.py
	$(BIN)/python benchmarks/cache.py

bench-gpu: $(READY)
	$(BIN)/python benchmarks/page.py --device cuda

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv demo

.venv/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -c 'import sys; assert sys.version_info >= (3, 11), f"Python >= 3.11 is needed, this is {sys.version}"'
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
