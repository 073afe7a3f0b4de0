# Each target makes its own .venv when missing. Nothing else needs to be installed than Python >= 3.11, git and make.
PYTHON ?= python3
BIN := .venv/bin
PROFILE ?= quick

.PHONY: demo test check bench bench-gpu format clean

demo: .venv/.ready
	$(BIN)/sparsekd demo --profile $(PROFILE)

test: .venv/.ready
	$(BIN)/python -m pytest

check: .venv/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: .venv/.ready
	$(BIN)/python benchmarks/page.py
	$(BIN)/python benchmarks/cache.py

bench-gpu: .venv/.ready
	$(BIN)/python benchmarks/page.py --device cuda

format: .venv/.ready
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
