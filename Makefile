# longattn: everything runs in a virtual environment that is made on first use. Needs Python >= 3.11 and a Rust toolchain.

PYTHON ?= python3
VENV ?= .venv
# Processes that run the Python tests: each holds the frameworks and a model or two, so not one for every core.
WORKERS ?= 2
BIN = $(VENV)/bin
RUST_SOURCES = $(shell find rust -name '*.rs') Cargo.toml Cargo.lock rust/longattn/Cargo.toml rust/longattn-python/Cargo.toml
# Wheels of packages that should not come from the index, such as a CPU build of torch.
PIP = $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo test test-core test-rust test-python lint format bench wheel clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("longattn needs Python >= 3.11, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade 'pip>=25.1'

# The package as a user gets it: an editable install of the compiled core, numpy and ml_dtypes.
$(VENV)/installed: $(BIN)/python pyproject.toml $(RUST_SOURCES)
	@command -v cargo >/dev/null || { echo 'cargo not found: install Rust from https://rustup.rs'; exit 1; }
	$(PIP) install --quiet --editable .
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(PIP) install --quiet --group test --group lint
	@touch $@

$(VENV)/installed-frameworks: $(VENV)/installed-test
	$(PIP) install --quiet --group frameworks --group gpu-check
	@touch $@

demo: $(VENV)/installed  ## Ask a small model for needles hidden in a long text, with exact and with retrieval attention
	$(BIN)/longattn demo --context 32768

test: $(VENV)/installed-frameworks lint test-rust  ## Run every check and test
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal

test-core: $(VENV)/installed-test lint test-rust  ## Run the checks and tests that need neither torch nor transformers
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal

test-rust:  ## Run the tests of the Rust crate
	cargo test --locked --package longattn

test-python: $(VENV)/installed-frameworks  ## Run the Python tests
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal

lint: $(VENV)/installed-test  ## Check format, lints and types
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- --deny warnings
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/installed-test  ## Format the sources
	cargo fmt --all
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

RESULTS ?= results

bench: $(VENV)/installed-frameworks  ## Measure decode, prefill, storage error and retrieval beside torch into RESULTS (results/)
	$(BIN)/longattn bench suite --out $(RESULTS)
	$(BIN)/longattn bench retrieval
	$(BIN)/longattn bench report $(RESULTS)

wheel: $(BIN)/python  ## Build a wheel into dist/
	$(PIP) wheel --quiet --no-deps --wheel-dir dist .

clean:  ## Remove what was built
	rm -rf $(VENV) target dist python/longattn/_core*.so
