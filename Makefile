# Every target first makes .venv and installs Headrace into it with the versions pinned in constraints.txt.
#
#   make demo      train a small policy by reinforcement learning, with Headrace as its rollout engine
#   make test      the whole test suite
#   make check     linter and strict type checks
#   make bench     a quick set of the benchmarks (docs/benchmarks.md has the full ones)
#   make clean     remove .venv, caches and build outputs
#
# With frameworks that train, each in an environment of its own (.venv-NAME, from tests/frameworks/NAME/requirements.txt):
#
#   make test-frameworks   all of them, or FRAMEWORKS="trl ray"; what NAME/without_dependencies.txt lists comes alone
#
# With a CUDA device:
#
#   make test-gpu  the tests that need it
#   make bench-gpu every figure of the GPU build
#
# For a GPU host without a network (docs/gpu.md):
#
#   make wheelhouse        fill WHEELHOUSE with what that host lacks
#   make wheelhouse-check  try the wheelhouse with the configured package index
#
# PYTHON    the interpreter that makes .venv (3.11 or newer)
# PIP_ARGS  added to every `pip install`, e.g. PIP_ARGS="--no-index --find-links /path/to/wheels" without a network, or
#           PIP_ARGS="--find-links /path/to/a/cpu/build" for a torch without the CUDA libraries
# ARGS      added to the command of all targets but check, bench and clean, e.g. make test ARGS="tests/cache -k evict"
# WORKERS   processes of make test; one more than two cores, as tests wait now and then
# SOAK      seconds that the soak test of make test-gpu runs
# GPU_WORKERS  processes of make test-gpu, which share the device
# PYTHON_GPU  an interpreter that has torch and all else already, e.g. PYTHON_GPU=python3: test-gpu and bench-gpu run in
#             it and make no .venv
# HAVE      what the host of the wheelhouse has: a file made there by `python tools/wheelhouse.py list`
# EXTRAS    extras of Headrace to put into the wheelhouse, comma-separated

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || echo python3)
PIP_ARGS ?=
ARGS ?=
WORKERS ?= 3
GPU_WORKERS ?= 8
SOAK ?= 20
PYTHON_GPU ?=
FRAMEWORKS ?= $(notdir $(patsubst %/requirements.txt,%,$(wildcard tests/frameworks/*/requirements.txt)))
WHEELHOUSE ?= wheelhouse
HAVE ?=
EXTRAS ?= test

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed.stamp
COMPILED := $(VENV)/compiled.stamp
GPU_PYTHON := $(or $(PYTHON_GPU),$(BIN)/python)
GPU_STAMP := $(if $(PYTHON_GPU),,$(STAMP))
# What is imported is compiled then, once, whatever the environment says: of what is installed it is a small part.
PIP_INSTALL := -m pip --disable-pip-version-check install --quiet --no-compile
PIP := $(BIN)/python $(PIP_INSTALL) --constraint constraints.txt $(PIP_ARGS)
# Frameworks choose their own versions of everything but this, which would else be the newest that there is.
TORCH := $(shell sed -n '/^torch==/p' constraints.txt)
# Headrace as the framework's page has it installed, and what tests need: what an extra lacks is missing in its checks.
WITH_EXTRA := trl ray verl
COMMA := ,
unexport PYTHONDONTWRITEBYTECODE

# Kept: a chain of patterns would have it removed as intermediate.
.PRECIOUS: .venv-%/installed.stamp

.PHONY: install demo test check bench test-gpu bench-gpu test-frameworks wheelhouse \
  wheelhouse-check clean
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

# What every worker imports is compiled here, once: they begin together, and each would compile all of it. A test that
# cannot be collected is told of by the run itself.
$(COMPILED): $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --collect-only -qq >/dev/null || true
	@touch $@

# One thread per test process: the workers share the cores.
test: $(COMPILED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/headrace bench prefix-cache --num-sequences 2000 --json
	$(BIN)/headrace bench overhead --batch-sizes 16,256 --num-waiting 1000 --seconds 2 --json
	$(BIN)/headrace bench offline --workload B --quick --vs transformers --json

# Two runs: what wants the device for itself, then the rest. pytest-benchmark, which a host may have, warns beside
# workers, and a warning is an error here. ARGS may choose tests of one run alone: pytest exits with 5 where it has
# none, which is an error here only if both do.
test-gpu: $(GPU_STAMP)
	alone=0; $(GPU_PYTHON) -m pytest tests/gpu -m alone $(ARGS) || alone=$$?; \
	test $$alone = 0 || test $$alone = 5 || exit $$alone; \
	HEADRACE_SOAK_SECONDS=$(SOAK) $(GPU_PYTHON) -m pytest tests/gpu -m "not alone" -p no:benchmark \
	  -n $(GPU_WORKERS) --dist worksteal $(ARGS) || { rest=$$?; test $$alone$$rest = 05 || exit $$rest; }

bench-gpu: $(GPU_STAMP)
	$(GPU_PYTHON) bench/gpu_report.py $(ARGS)

test-frameworks: $(FRAMEWORKS:%=test-framework-%)

.venv-%/installed.stamp: pyproject.toml constraints.txt tests/frameworks/%/requirements.txt
	test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python $(PIP_INSTALL) hatchling editables $(PIP_ARGS)
	.venv-$*/bin/python $(PIP_INSTALL) --no-build-isolation \
	  --requirement tests/frameworks/$*/requirements.txt '$(TORCH)' $(PIP_ARGS) \
	  --editable '.[test$(addprefix $(COMMA),$(filter $*,$(WITH_EXTRA)))]'
	alone=tests/frameworks/$*/without_dependencies.txt; test ! -f $$alone || .venv-$*/bin/python \
	  $(PIP_INSTALL) --no-deps --requirement $$alone $(PIP_ARGS)
	@touch $@

test-framework-%: .venv-%/installed.stamp
	OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest $(wildcard tests/frameworks/$*/check_*.py) $(ARGS)

wheelhouse: $(STAMP)
	$(BIN)/python tools/wheelhouse.py download $(WHEELHOUSE) --extras '$(EXTRAS)' $(if $(HAVE),--have $(HAVE)) $(ARGS)

wheelhouse-check: $(STAMP)
	$(BIN)/python -m pytest tests/tools/check_wheelhouse.py $(ARGS)

clean:
	rm -rf $(VENV) .venv-* build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis demo-output
	find headrace tests bench tools examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
