PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
JOBS := $(shell n=$$(nproc); [ $$n -gt 2 ] && echo 2 || echo $$n)
GPUS := $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU')
RANKS ?= $(shell [ $(GPUS) -eq 0 ] && echo $(JOBS) || { [ $(GPUS) -gt 2 ] && echo 2 || echo $(GPUS); })
PREPARE := $(BIN)/python -m data_prep.prepare --source folder --size 56 --tokenizer tiny
export DS_ACCELERATOR ?= $(if $(filter 0,$(GPUS)),cpu,cuda)
TRAIN := OMP_NUM_THREADS=$(shell echo $$(( ($$(nproc) + $(RANKS) - 1) / $(RANKS) ))) PATH="$(CURDIR)/$(BIN):$$PATH" \
	$(BIN)/deepspeed --log_level warning --num_gpus $(RANKS) launch/train.py
REAL ?= ../shared/fixtures/videos/manifest.jsonl

.PHONY: help install demo demo-real test test-all lint format clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(BIN)/.installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $(TORCH)  # first and alone: an open range would fetch another build
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	$(BIN)/pip install -q -c constraints.txt --no-deps lmms-eval  # what it asks for excludes packages of ours
	@touch $@

install: $(BIN)/.installed  ## make .venv and install everything into it

demo: install  ## draw clips, prepare, train, evaluate, report: minutes on two idle cores
	$(BIN)/python -m data_prep.synthetic --out demo/clips --clips 12000 --val-clips 200 --frames 5 --mix cue=0.72,caption=0.14,text=0.14
	$(PREPARE) --input demo/clips --manifest train.jsonl --out demo/shards/train
	$(PREPARE) --input demo/clips --manifest val.jsonl --out demo/shards/val
	$(TRAIN) --config demo --ds_config zero2.json
	$(TRAIN) --config demo --ds_config zero2.json name=demo-pooled-4 model.architecture=multi_token model.grid=4
	$(TRAIN) --config demo --ds_config zero2.json name=demo-coarse train.mode=coarse_only
	$(BIN)/python launch/evaluate.py --checkpoint runs/demo
	$(BIN)/python launch/evaluate.py --checkpoint runs/demo-pooled-4 --tasks loss slots
	$(BIN)/python launch/evaluate.py --checkpoint runs/demo-coarse --tasks loss slots --modes coarse_only
	$(BIN)/python launch/report.py runs/demo --compare runs/demo-pooled-4 runs/demo-coarse
	@echo; echo "Look at runs/demo/report.md (curves, three modes) and runs/demo/figures/strip-00.png (where each token looked)."

demo-real: install  ## the same road on real videos and photos: REAL=path/to/manifest.jsonl
	$(PREPARE) --manifest $(REAL) --out demo/shards/real
	rm -rf demo/shards/real-val  # drawn anew from what was prepared now
	$(BIN)/python -m data_prep.validation --shards demo/shards/real --out demo/shards/real-val --samples 6
	$(TRAIN) --config tiny --ds_config zero2.json name=real data.train=[demo/shards/real] data.val=[demo/shards/real-val]
	$(BIN)/python launch/evaluate.py --checkpoint runs/real
	$(BIN)/python launch/report.py runs/real
	@echo; echo "Look at runs/real/report.md"

test: install  ## the tests, on two processes
	$(BIN)/pytest -n $(JOBS) --dist worksteal -m "not slow"

test-all: install  ## the tests with the slow ones
	$(BIN)/pytest -n $(JOBS) --dist worksteal

lint: install  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install  ## let ruff rewrite
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove what the demo made (not .venv)
	rm -rf demo runs/demo runs/demo-*
