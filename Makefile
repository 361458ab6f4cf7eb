# Every target first makes .venv and installs Headrace into it with the versions pinned in constraints.txt.
#
#   make demo      train a small policy by reinforcement learning, with Headrace as its rollout engine
#   make test      the whole test suite
#   make check     linter and strict type checks
#   make bench     a quick set of the benchmarks (docs/benchmarks.md has the full ones)
#   make test-gpu  the tests that need a CUDA device
#   make clean     remove .venv, caches and build outputs
#
# PYTHON    the interpreter that makes .venv (3.11 or newer)
# PIP_ARGS  added to every `pip install`, e.g. PIP_ARGS="--no-index --find-links /path/to/wheels" without a network, or
#           PIP_ARGS="--find-links /path/to/a/cpu/build" for a torch without the CUDA libraries
# ARGS      added to the command of demo, test and test-gpu, e.g. make test ARGS="tests/cache -k evict"

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || echo python3)
PIP_ARGS ?=
ARGS ?=
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed.stamp
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt $(PIP_ARGS)

.PHONY: install demo test check bench test-gpu clean
.DELETE_ON_ERROR:

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Headrace needs Python 3.11 or newer; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) hatchling editables
	$(PIP) --no-build-isolation --editable '.[demo,dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/headrace demo $(ARGS)

# One thread per test process: the workers share the cores.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/headrace bench prefix-cache --num-sequences 2000 --json
	$(BIN)/headrace bench overhead --batch-sizes 16,256 --num-waiting 1000 --seconds 2 --json
	$(BIN)/headrace bench offline --workload B --quick --vs transformers --json

test-gpu: $(STAMP)
	$(BIN)/python -m pytest tests/gpu $(ARGS)

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis demo-output
	find headrace tests bench examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
