# Two commands on a fresh machine: `make demo` and `make test`. Both set up a virtual environment in .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-all oldest recipes lint docs wheel fuzz study mutation gpu gpu-wheels clean

demo: $(VENV)/.recipes
	$(BIN)/python recipes/llama31_gsm8k.py --method lora lora-over-mpo-r

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

test-all: lint
	TNADAPT_HYPOTHESIS_PROFILE=all $(BIN)/python -m pytest -n 2 --dist loadfile

# The tests of the core with the oldest torch that pyproject.toml states, in an environment of its own.
OLDEST := .venv-oldest
OLDEST_TORCH := $(shell sed -n 's/^dependencies = \["torch>=\([0-9.]*\)"\]$$/\1/p' pyproject.toml)
CORE_TESTS := tests/engine tests/factorizations $(addprefix tests/test_,$(addsuffix .py,\
	adapter adapter_models algorithm2 loss_ablation matrices planning schedulers))

oldest: $(OLDEST)/.torch-$(OLDEST_TORCH)
	$(OLDEST)/bin/python -c "import torch; print('torch', torch.__version__)"
	$(OLDEST)/bin/python -m pytest -m "not slow" $(CORE_TESTS)

# Every method in every recipe, for a few steps of its laptop preset.
recipes: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 tests/recipes/test_methods.py -k learns_in_a_recipe

# Every property drawn anew, and RUNS random runs of each test in tests/fuzz. Takes hours; SEED repeats a former draw.
RUNS ?= 2000

fuzz: $(VENV)/.dev
	@seed=$(or $(SEED),$$($(BIN)/python -c "import secrets; print(secrets.randbelow(2**32))")); \
	echo "to draw the same again: make fuzz RUNS=$(RUNS) SEED=$$seed"; \
	RUNS=$(RUNS) TNADAPT_HYPOTHESIS_PROFILE=all $(BIN)/python -m pytest -n 2 -m hypothesis --hypothesis-seed=$$seed

# The runs that docs/study.md lacks, and the page. Takes a day; what is finished is not run again. ENCODER and SST2 are folders, see recipes/study.py.
study: $(VENV)/.recipes
	$(BIN)/python recipes/study.py run --workers 2 $(if $(ENCODER),--encoder $(ENCODER)) $(if $(SST2),--sst2 $(SST2))
	$(BIN)/python recipes/study.py report

# The data of docs/mutation.md: how many small faults in the code the tests notice. Takes hours; what is finished is not run again.
mutation: $(VENV)/.mutation
	$(BIN)/python tests/mutation/run.py --workers 2

# What needs a GPU: tests, then benchmarks, each step in less than ten minutes; what has a result of this code on this device is
# not run again. GPU_PYTHON is taken if its torch sees a GPU; else torch comes from the wheels. See docs/gpu.md.
GPU_PYTHON ?= python3
GPU_RESULTS ?= benchmarks/results/gpu
GPU_WHEELS ?= build/gpu-wheels
GPU_OPTIONS ?=

gpu:
	@$(GPU_PYTHON) benchmarks/gpu.py --results $(GPU_RESULTS) --wheels $(GPU_WHEELS) $(GPU_OPTIONS)

# To be carried to a machine without a network. GPU_TORCH=torch (or torch==2.8.0, for an older driver) brings torch along.
GPU_TORCH ?=
GPU_PYTHON_VERSION ?= 3.12
GPU_PACKAGES ?= accelerate bitsandbytes hypothesis jaxtyping matplotlib numpy peft pytest pytest-xdist rich safetensors scipy tqdm transformers

gpu-wheels:
	$(PYTHON) benchmarks/wheels.py download $(GPU_WHEELS) --python $(GPU_PYTHON_VERSION) --constraints constraints.txt \
		$(if $(GPU_TORCH),--torch $(GPU_TORCH),) $(GPU_PACKAGES)

# The site, in build/docs; a warning is an error. Its notebooks are executed.
docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs
	@echo "the site is build/docs/index.html"

# The source distribution and, made from it, the wheel, in dist.
wheel: $(VENV)/.docs
	$(BIN)/python -m build --outdir dist

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

$(VENV)/.docs: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --progress-bar on -c constraints.txt -e ".[docs]"
	@touch $@

$(VENV)/.mutation: $(VENV)/.dev
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --progress-bar on -c constraints.txt -e ".[mutation]"
	@touch $@

# that torch asks for a sympy of its own
$(OLDEST)/.torch-$(OLDEST_TORCH): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(OLDEST)
	grep -v -e '^torch==' -e '^sympy==' constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --disable-pip-version-check --quiet --progress-bar on -c $(OLDEST)/constraints.txt \
		"torch==$(OLDEST_TORCH).*" -e ".[transformers,all]" hypothesis jaxtyping pytest scipy sybil tqdm
	@touch $@

clean:
	rm -rf $(VENV) $(OLDEST) runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
