# Two commands on a fresh machine: `make demo` and `make test`. Both set up a virtual environment in .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-all lint clean

demo: $(VENV)/.recipes
	$(BIN)/python recipes/llama31_gsm8k.py --method lora lora-over-mpo-r

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

test-all: lint
	TNADAPT_HYPOTHESIS_PROFILE=all $(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/pyvenv.cfg:
	$(PYTHON) -m venv $(VENV)

# torch comes first and pinned: a looser requirement would pull another build
$(VENV)/.torch: $(VENV)/pyvenv.cfg constraints.txt
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --progress-bar on -c constraints.txt torch
	@touch $@

$(VENV)/.recipes: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --progress-bar on -c constraints.txt -e ".[recipes]"
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --progress-bar on -c constraints.txt -e ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
