# Everything happens in .venv; each target prepares what it needs, and does nothing twice.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)
CXX_FILES := $(shell find csrc tests/emulator -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  \1\t/p' Makefile

.venv/installed: requirements-dev.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is missing: apt-get install python3 python3-venv"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "$$($(PYTHON) --version) is too old: make PYTHON=python3.10 or newer"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "venv is missing: apt-get install python3-venv"; exit 1; }
	@echo "setting up .venv: downloads torch, takes minutes"
	@$(BIN)/pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

.venv/built: .venv/installed $(SOURCES)
	@echo "building sparsekern"
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@$(BIN)/python -m sparsekern doctor | sed -n '/^build/,/^machine/p' | sed '$$d'
	@touch $@

build: .venv/built  ## set up .venv and compile the kernels

test: build lint  ## lint and the whole test suite
	$(BIN)/python -m pytest -q

# Only our own library is instrumented, so the runtimes must be there before Python is: preloaded, libstdc++ among them
# because AddressSanitizer looks up __cxa_throw at the start. Leaks are not looked for: Python and torch keep memory until
# the process ends. --capture=sys leaves reports on the terminal. The inputs of the *_long.py tests, 4 GB of unwritten
# memory, would be copied into memory that is written. Emulated kernels have a target of their own.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
OPERATOR_TESTS := $(addprefix $(CURDIR)/,$(filter-out %_long.py,$(wildcard tests/test_masked_*.py tests/test_packing.py \
    tests/test_topk_*.py tests/test_sparse_*.py tests/test_batch_norm.py tests/test_bare_operators.py)))

test-sanitize: build  ## operator tests under AddressSanitizer and UndefinedBehaviorSanitizer (g++)
	@echo "building sparsekern with sanitizers"
	@SPARSEKERN_CUDA=off CXX=g++ CFLAGS="$(SANITIZE)" LDFLAGS="$(SANITIZE)" \
	    $(BIN)/python setup.py -q build --build-base build/sanitize > build/sanitize.log 2>&1 \
	    || { cat build/sanitize.log; exit 1; }
	cd build/sanitize/lib* && ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	    LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	    $(CURDIR)/$(BIN)/python -m pytest -q --capture=sys -p no:cacheprovider -k "not emulated" $(OPERATOR_TESTS)

test-emulator-asan: .venv/installed  ## every CUDA kernel, emulated, under AddressSanitizer
	cd tests && $(CURDIR)/$(BIN)/python -m emulator.sanitize address

test-emulator-race: .venv/installed  ## every CUDA kernel, emulated, under ThreadSanitizer: a race detector
	cd tests && $(CURDIR)/$(BIN)/python -m emulator.sanitize thread

gpu: build  ## on a machine with a GPU: the suite on the device, compute-sanitizer, benchmarks with device events
	$(BIN)/python -m benchmarks.gpu

demo: build  ## AC/DC training to 95% sparsity on scikit-learn's digits
	$(BIN)/python -m sparsekern train digits --name demo --overwrite

bench: build  ## quick benchmarks, each within a minute on a quiet machine
	$(BIN)/python -m benchmarks.bench_masked_sgd --quick
	$(BIN)/python -m benchmarks.bench_masked_adamw --quick
	$(BIN)/python -m benchmarks.bench_topk_mask --quick
	$(BIN)/python -m benchmarks.bench_sparse_conv2d --quick
	$(BIN)/python -m benchmarks.bench_sparse_linear --quick
	$(BIN)/python -m benchmarks.bench_sparse_structure --quick
	$(BIN)/python -m benchmarks.bench_batch_norm --quick
	$(BIN)/python -m benchmarks.bench_list_operators --quick

lint: .venv/installed  ## ruff and clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

wheel: .venv/installed  ## a wheel for this Python and platform in dist/
	$(BIN)/pip wheel --quiet --disable-pip-version-check --no-build-isolation --no-deps -w dist .

clean:  ## remove build products, keep .venv and runs
	rm -rf build dist *.egg-info sparsekern/*.so sparsekern/_build_info.json .venv/built

.PHONY: help build test test-sanitize test-emulator-asan test-emulator-race gpu demo bench lint wheel clean
