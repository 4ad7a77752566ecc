PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
JOBS := $(shell n=$$(nproc); [ $$n -gt 2 ] && echo 2 || echo $$n)
LAUNCH := $(BIN)/python -m torch.distributed.run --standalone --nproc_per_node $(JOBS)
REAL := ../shared/fixtures/videos/manifest.jsonl

.PHONY: help install demo demo-real test test-all lint format clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(BIN)/.installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $(TORCH)  # first and alone: an open range would fetch another build
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

install: $(BIN)/.installed  ## make .venv and install everything into it

test: install  ## the tests, on two processes
	$(BIN)/pytest -n $(JOBS) -m "not slow"

test-all: install  ## the tests with the slow ones
	$(BIN)/pytest -n $(JOBS)

lint: install  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install  ## let ruff rewrite
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove what the demo made (not .venv)
	rm -rf demo runs/demo runs/demo-*
