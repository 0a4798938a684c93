# Everything runs from the checkout in a virtual environment at .venv; see `make help`.
PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= dev,wandb,slurm,deepspeed
TORCH_INDEX ?=
ARGS ?=

BIN := $(VENV)/bin
CORPUS := corpus/stdlib
VOCABULARY := $(shell sed -n 's/^vocabulary: *\([0-9]*\).*/\1/p' conf/model/tiny.yaml)
TORCH := $(shell grep '^torch==' constraints.txt)
TRITON := triton==3.6.0
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
READY := $(VENV)/.ready
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help setup corpus train test lint format figures clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  ARGS         passed on:              make train ARGS=\"attention=full\"   make test ARGS=\"tests/data -x\""
	@echo "  PYTHON       interpreter, 3.11 on:   make setup PYTHON=python3.12"
	@echo "  TORCH_INDEX  where torch comes from: make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu"
	@echo "  EXTRAS       of pyproject.toml:      make setup EXTRAS=dev"

setup: $(READY)  ## install everything into .venv (train and test do it by themselves)
	@echo "ready: $(BIN)/python"

corpus: $(CORPUS)/manifest.json  ## a small training corpus from Python's standard library

train: $(READY) $(CORPUS)/manifest.json  ## train the tiny model
	@$(BIN)/python train.py +experiment=tiny $(ARGS)

# Two files at a time, whose tests share what they have prepared, in alphabetical order: the long ones are not last.
test: $(READY)  ## run the tests
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(READY)  ## check style, change nothing
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/hadolint Dockerfile

format: $(READY)  ## put style right where ruff can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

figures: $(READY)  ## redraw the pictures in docs/
	@$(BIN)/python docs/figures.py
	@$(BIN)/python -m docs.kernel_figures
	@$(BIN)/python -m docs.roofline_figure

clean:  ## remove .venv and caches; runs and corpora stay
	@rm -rf $(VENV) .pytest_cache .ruff_cache build *.egg-info
	@find . -name __pycache__ -not -path "./.git/*" -prune -exec rm -rf {} +
	@echo "removed $(VENV) and caches; runs/ and corpus/ are untouched"

# torch goes first, so that a CPU build from TORCH_INDEX is in place before anything else asks for torch. CUDA builds
# bring the Triton they need; for the others it is the one whose interpreter and compiler the tests use.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}: make PYTHON=python3.11")'
	@echo "set-up 1/3  $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@echo "set-up 2/3  $(TORCH)$(if $(TORCH_INDEX), from $(TORCH_INDEX), (a CUDA build takes gigabytes; without a GPU see TORCH_INDEX in make help))"
	@$(PIP) install $(TORCH) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	@$(BIN)/python -c "import triton" 2>/dev/null || $(PIP) install $(TRITON)
	@echo "set-up 3/3  hysparse[$(EXTRAS)] and what it needs (about a minute)"
	@$(PIP) install -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@

# 30 MB of text that every Python has: about 10 million tokens in 15 seconds. A new set-up does not repeat it.
$(CORPUS)/manifest.json: | $(READY)
	@echo "corpus      $(CORPUS) from Python's standard library"
	@$(BIN)/python -m data.prepare input=stdlib output=$(CORPUS) tokenizer=train:$(VOCABULARY)
