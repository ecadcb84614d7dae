# make demo   sets everything up, then compares pruning methods on real handwritten digits
# make test   sets everything up, then runs the tests
PYTHON ?= python3.11
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint verdicts verdicts-real bench clean

help:
	@sed -n 's/^# //p' Makefile
	@echo "also: make lint | verdicts | verdicts-real | bench | clean"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "weightroom needs Python 3.11 or later: install it, or say make PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $(READY)

demo: $(READY)
	$(BIN)/weightroom compare prune --task digits --store runs --report report.html

test: $(READY)
	$(BIN)/python -m pytest -n 2

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

verdicts: $(READY)
	$(BIN)/weightroom verdicts --record --scale small
	$(BIN)/python -m weightroom.record_verdicts .

verdicts-real: $(READY)
	$(BIN)/weightroom verdicts --record --scale real
	$(BIN)/python -m weightroom.record_verdicts .

bench: $(READY)
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) build dist *.egg-info src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
