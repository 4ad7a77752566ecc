PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0

.PHONY: help install demo demo-real test test-slow test-gpu lint format clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(BIN)/.installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $(TORCH)  # first and alone: an open range would fetch another build
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

install: $(BIN)/.installed  ## make .venv and install everything into it

demo: install  ## draw clips, prepare, train, evaluate, report: about ten minutes on two cores
	$(BIN)/python -m launch.demo_run
