# Everything here needs only Python 3.11 or later, make and git.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.stamp-setup

# Recipe overrides for the demo, for example: make demo ARGS="seed=1"
ARGS ?=

.DELETE_ON_ERROR:
.PHONY: help setup demo test test-models test-cluster docs lint format clean

help:
	@echo "make setup   build $(VENV) with the package and its development dependencies"
	@echo "make demo    run the whole pipeline on real handwritten digits, results in runs/latest"
	@echo "make test    every check: lint, format, types, layers, tests with coverage"
	@echo "make test-models   trace torchvision's and timm's classifiers, and check each"
	@echo "make test-cluster  runs on machines that are cut off and killed (root, iproute2)"
	@echo "make docs    build the documentation in site/"
	@echo "make lint    the checks that start no process"
	@echo "make format  rewrite the code in the house style"
	@echo "make clean   remove $(VENV) and caches, keep runs"

setup: $(STAMP)

# uv resolves what pip's resolver can search for an hour among (s3fs, aiobotocore, boto3). Each of
# the many processes of a run imports torch and ray: from bytecode, or it compiles them first.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"found Python {v.major}.{v.minor}; expected 3.11 or later; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --editable '.[dev]'
	@touch $@

demo: setup
	$(BIN)/stp run demo storage=runs $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Each process imports torch, and holds nearly a GB. What may not share a computer is in one group.
SIDE_BY_SIDE := -n auto --maxprocesses 4 --dist loadgroup

# The networks of the tests are small: more threads than one would only wait for each other.
test test-cluster: export OMP_NUM_THREADS ?= 1

test: lint
	$(BIN)/pytest $(SIDE_BY_SIDE) --cov --cov-report=term

test-models: setup
	$(BIN)/pytest $(SIDE_BY_SIDE) -m models tests/elastic

test-cluster: setup
	$(BIN)/pytest -m cluster tests/cluster

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist site *.egg-info .coverage .coverage.* .mypy_cache .pytest_cache .ruff_cache \
		.hypothesis .import_linter_cache
	find stp_ray pipelines benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +
