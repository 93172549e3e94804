# Everything happens in .venv; each target prepares what it needs.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile

.venv/installed: requirements-dev.txt
	@$(PYTHON) -m venv .venv || { echo "venv is missing: apt-get install python3-venv python3-dev"; exit 1; }
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -r requirements-dev.txt
	@touch $@

.venv/built: .venv/installed $(SOURCES)
	$(BIN)/pip install --quiet --no-build-isolation --no-deps -e .
	@touch $@

build: .venv/built  ## set up .venv and compile the kernels

lint: .venv/installed  ## ruff and clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc -name '*.cpp' -o -name '*.h')

test: build lint  ## lint and the whole test suite
	$(BIN)/python -m pytest -q

demo: build  ## AC/DC training to 95% sparsity on scikit-learn's digits
	$(BIN)/python -m sparsekern.train digits --name demo --overwrite

bench: build  ## quick benchmarks
	$(BIN)/python -m benchmarks.bench_masked_sgd --quick

wheel: .venv/installed  ## a wheel in dist/
	$(BIN)/pip wheel --quiet --no-build-isolation --no-deps -w dist .

clean:  ## remove build products, keep .venv
	rm -rf build dist *.egg-info sparsekern/*.so .venv/built

.PHONY: help build lint test demo bench wheel clean
