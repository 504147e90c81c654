# Each command works first and alone on a fresh machine with Python 3.11 or newer, make and a C++ compiler.
# PYTHON=python3.12 make test   uses another Python.

PYTHON ?= python3
VENV_PYTHON := .venv/bin/python
RUN := runs/quickstart-$(shell date +%Y%m%d-%H%M%S)
export PYTHONSAFEPATH := 1

.PHONY: help quickstart test test-full lint format install install-test check-python
.DEFAULT_GOAL := help

help:
	@echo "make quickstart   install what is needed, train a small hybrid model, evaluate it, let it write"
	@echo "make test         install what is needed, run every check"
	@echo "make test-full    the same with the tests that take long, whole products of cases: many hours;"
	@echo "                  make test-full PART=3/200 takes every 200th test, from the third on"
	@echo "make lint         ruff, types and import rules only"
	@echo "make format       let ruff format and mend what it can"

quickstart: install
	@echo "==> training: longtrain train quickstart"
	@$(VENV_PYTHON) -m longtrain train quickstart run_dir=$(RUN)
	@echo "==> evaluating: longtrain eval $(RUN)"
	@$(VENV_PYTHON) -m longtrain eval $(RUN)
	@echo "==> writing: longtrain generate $(RUN) --prompt 'def '"
	@$(VENV_PYTHON) -m longtrain generate $(RUN) --prompt "def "
	@echo "==> look at: $(RUN)/summary.json $(RUN)/loss.png $(RUN)/loss_by_position.png"

# The lints come first: pytest's count of passed and failed tests closes the output.
test: lint
	@echo "==> pytest"
	@$(VENV_PYTHON) -m pytest

test-full: lint
	@echo "==> pytest --full $(if $(PART),--part $(PART))"
	@$(VENV_PYTHON) -m pytest --full $(if $(PART),--part $(PART))

lint: install-test
	@echo "==> ruff check"
	@$(VENV_PYTHON) -m ruff check
	@echo "==> ruff format --check"
	@$(VENV_PYTHON) -m ruff format --check
	@echo "==> basedpyright"
	@$(VENV_PYTHON) -m basedpyright --pythonpath $(VENV_PYTHON)
	@echo "==> import-linter"
	@$(VENV_PYTHON) -c "from importlinter.cli import lint_imports_command; lint_imports_command()"

format: install-test
	@$(VENV_PYTHON) -m ruff check --fix
	@$(VENV_PYTHON) -m ruff format

install: check-python
	@$(PYTHON) .ci/install.py

install-test: check-python
	@$(PYTHON) .ci/install.py test

check-python:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
		{ echo "longtrain needs Python 3.11 or newer; '$(PYTHON)' is not. Name another: make test PYTHON=python3.12"; exit 1; }
