# make demo: optimise the model that ships here and measure it.   make test: everything that must hold.
# Both work from a fresh clone with python3 (3.11 or newer), make, g++ and git.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --quiet --quiet --disable-pip-version-check

DEMO     := build/demo
MODEL    := examples/tiny_video
OPTIMIZE := --quality fast --guidance 1
BENCH    := --limit 5
# Files of tests are shared out among so many processes, of one thread each: threads of two would wait for each other.
WORKERS  := --numprocesses auto --maxprocesses 4 --dist loadfile
PROFILE  := --guidance 1 --limit 2 $(foreach table,attention patterns features tokens linear,--collect $(table))

.PHONY: demo test lint format clean

demo: $(VENV)/.installed
	mkdir -p $(DEMO)
	$(BIN)/ditopt optimize $(MODEL) --prompts $(MODEL)/calibration_prompts.txt -o $(DEMO)/plan.yaml $(OPTIMIZE)
	$(BIN)/ditopt show $(DEMO)/plan.yaml
	$(BIN)/ditopt bench $(MODEL) --plan $(DEMO)/plan.yaml --prompts $(MODEL)/prompts.txt $(BENCH) --json $(DEMO)/bench.json
	$(BIN)/ditopt profile $(MODEL) --prompts $(MODEL)/calibration_prompts.txt $(PROFILE) -o $(DEMO)/model.profile
	$(BIN)/ditopt report $(DEMO)/plan.yaml --bench $(DEMO)/bench.json --profile $(DEMO)/model.profile -o $(DEMO)/report.html
	@echo "The plan is $(DEMO)/plan.yaml, its figures are $(DEMO)/bench.json, the report to open is $(DEMO)/report.html."

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS) $(PYTEST)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist ./*.egg-info

# torch goes first and alone: it is most of the download, and a machine that has its own build of the pinned
# version (for its accelerator, say) keeps it.
$(VENV)/.installed: constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("ditopt needs Python 3.11 or newer: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --constraint constraints.txt torch
	$(PIP) install --constraint constraints.txt --editable ".[diffusers,bench,dev]"
	touch $@
