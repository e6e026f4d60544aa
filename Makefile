# Every target installs what it needs into .venv and is quick the second time.
# Another Python: make PYTHON=python3.12 install      More test workers: make JOBS=8 test

PYTHON ?= python3
JOBS ?= 2
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
PACKAGING := setup.py pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test check bench verify clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/.installed-dev  ## the package, editable, with everything needed to work on it

demo: $(VENV)/.installed-demo  ## train a small model on real data and show what it generates (runs/demo/)
	$(BIN)/python -m transfusion.demo $(ARGS)

# One thread a worker: the workers are the parallelism. tests/ptx compiles, which a process under Triton's interpreter cannot.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist loadgroup

test: $(VENV)/.installed-dev  ## all tests
	$(PYTEST) $(ARGS)
	$(if $(ARGS),,TRITON_INTERPRET=0 $(PYTEST) tests/ptx)

check: $(VENV)/.installed-dev  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.installed-dev  ## benchmarks, on the GPU where there is one
	$(BIN)/python -m pytest benchmarks --benchmark-only $(ARGS)

verify: $(VENV)/.installed-demo  ## check every kernel against its reference on this machine
	$(BIN)/python -m transfusion verify $(ARGS)

clean:  ## remove what builds and tools leave behind; .venv and runs/ stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

# pip is the last thing that venv writes, so its presence says that the environment is whole.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "error: '$(PYTHON)' is missing or older than Python 3.10; try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' \
		|| { echo "error: '$(PYTHON)' cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The demo does not wait for the developer's tools; both stamps are newer than what they were installed from.
$(VENV)/.installed-demo: $(PACKAGING) | $(BIN)/pip
	$(PIP_INSTALL) -e ".[demo]"
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed-demo
	$(PIP_INSTALL) -e ".[dev]"
	@touch $@
