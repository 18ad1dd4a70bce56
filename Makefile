# The commands of README.md and CONTRIBUTING.md. PYTHON picks the interpreter: make test PYTHON=python3.12
PYTHON ?= python
# What pytest gets besides, for example: make test PYTEST_ARGS="-m 'not slow' -x"
PYTEST_ARGS ?=

.PHONY: check format test quickstart

check:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(PYTHON) -m pytest -q tests/test_layout.py

format:
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

test:
	$(PYTHON) -m pytest $(PYTEST_ARGS)

quickstart:
	$(PYTHON) -m megatron_ext train quickstart
