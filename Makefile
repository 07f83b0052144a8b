# One environment for everything: .venv in this folder, or VENV=path. `make bench` and `make test` build it if needed.
VENV ?= .venv
PYTHON ?= python3
ARCH := $(shell uname -m)

# torch and torchvision must match each other; these pairs are known to work together.
ifeq ($(ARCH),aarch64)
TORCH ?= torch==2.9.1 torchvision==0.24.1
else
TORCH ?= torch==2.14.1 torchvision==0.29.1
endif

BIN := $(VENV)/bin
READY := $(VENV)/.ironclip-ready
STORE ?= store
OUT ?= report

.PHONY: env bench test lint types contracts check benchmarks clean

env: $(READY)

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH) -e ".[dev]"
	touch $(READY)

bench: $(READY)
	$(BIN)/ironclip bench --store $(STORE) --out $(OUT)

test: $(READY)
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(READY)
	$(BIN)/ruff check src tests scripts benchmarks
	$(BIN)/ruff format --check src tests scripts benchmarks

types: $(READY)
	$(BIN)/mypy

contracts: $(READY)
	$(BIN)/lint-imports

check: lint types contracts test

benchmarks: $(READY)
	$(BIN)/python benchmarks/run_all.py

clean:
	rm -rf $(VENV) store report build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
