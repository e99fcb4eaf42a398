# Stillhouse: `make quickstart` runs the main job, `make test` the tests, `make check` lint and types.

VENV ?= .venv
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
	&& echo $$p && break; done)
BIN := $(VENV)/bin

.PHONY: help quickstart test test-quick test-all chaos check docs clean

help:
	@sed -n 's/^\([a-z-]*\):.*## /\1: /p' Makefile

$(VENV)/.installed: requirements.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "Stillhouse needs Python 3.11, 3.12 or 3.13 on the PATH"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	@touch $@

quickstart: $(VENV)/.installed ## text → tokenizer, teacher, distilled student, control, report
	$(BIN)/stillhouse run quickstart

PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadgroup --no-loadscope-reorder

test: $(VENV)/.installed-dev ## what a change has to pass
	$(PYTEST)

test-quick: $(VENV)/.installed-dev ## without Ray, and without what compiles much
	$(PYTEST) -m "not cluster and not slow"

test-all: $(VENV)/.installed-dev ## everything, the whole chaos included; for a night
	$(PYTEST) --all

chaos: $(VENV)/.installed-dev ## every fault under one run; its table in docs/reliability.md
	$(BIN)/python -m tests.chaos --page docs/reliability.md

check: $(VENV)/.installed-dev ## lint, format, types, and which package may import which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright

docs: $(VENV)/.installed-dev ## the pages that are made from the code
	$(BIN)/python -m configs.reference > docs/configuration.md
	$(BIN)/python -m tests.promises > docs/tests.md

clean: ## removes what make has installed; runs stay
	rm -rf $(VENV)
