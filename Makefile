# Coterie's commands. `make demo` and `make test` are all that a newcomer needs.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-all lint serve install clean check-python

demo: install ## a first search, end to end, in a few minutes
	@$(BIN)/coterie demo

# A file's tests stay together: they share servers. Beyond a few processes the longest file decides.
PARALLEL := -n auto --maxprocesses 4 --dist loadfile

test: install ## the fast tests
	$(BIN)/python -m pytest -m "not slow" $(PARALLEL)

test-all: install ## all tests, those with a real server under real faults too
	$(BIN)/python -m pytest -m "not slow" $(PARALLEL)
	$(BIN)/python -m pytest -m slow

lint: install ## style, types, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=.typing $(BIN)/lint-imports

serve: install ## a server that stays, http://127.0.0.1:8000
	@$(BIN)/coterie serve

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt | check-python
	@echo "Installing Coterie into $(VENV); this takes a minute or two (PyTorch and Ray are large)."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

check-python:
	@if [ -z "$(PYTHON)" ]; then \
		echo "Coterie needs Python 3.11, 3.12 or 3.13; none was found. On Debian: apt install python3 python3-venv" >&2; \
		exit 2; \
	fi
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || { \
		echo "Coterie needs Python 3.11, 3.12 or 3.13; $(PYTHON) is $$($(PYTHON) --version 2>&1)." >&2; \
		echo "Install one of these, or name it: make demo PYTHON=/path/to/python3.11" >&2; \
		exit 2; \
	}
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
		echo "$(PYTHON) lacks venv. On Debian: apt install python3-venv" >&2; \
		exit 2; \
	}

clean: ## remove the environment and what tools left; data folders stay
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
