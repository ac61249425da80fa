# make demo   the whole job on synthetic data     make install  the environment alone, in .venv
# make ui     MLflow on 127.0.0.1:5000            make check    lint, types, layering, documentation
# make docs   the documentation, in site/         make test     the tests, 10 minutes at most
# make test-ci  what CI adds to `make test`: a kill, a lost node, submitted jobs, more fuzzing
# make test-all  everything, by hand before a release; it continues where it ended. PARTS="kills walk": these parts alone
# make gpu-check  every CUDA path on one NVIDIA GPU, 10 minutes; DEVICE=cpu ARGS=--tiny rehearses it on a CPU
# make verify CONFIG=configs/finetune.yaml ARGS="--set corpus.root=/data/IEMOCAP": one fold, against the target
# make job CONFIG=configs/finetune.yaml ARGS="--set corpus.root=/data/IEMOCAP": the main job on a Ray cluster
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
RESULTS ?= results
PORT ?= 5000
DEVICE ?= cuda:0
CONFIG ?= configs/demo.yaml

.PHONY: install demo ui job verify test test-ci test-all gpu-check check docs bench encoder clean

install: $(VENV)/.demo

demo: $(VENV)/.demo
	$(BIN)/python -m cvrunner all-folds

ui: $(VENV)/.demo
	$(BIN)/python -m cvrunner ui $(RESULTS) --port $(PORT)

job: $(VENV)/.demo
	$(BIN)/python -m cvrunner submit -- all-folds --config $(CONFIG) $(ARGS)

verify: CONFIG = configs/finetune.yaml
verify: $(VENV)/.demo
	$(BIN)/python -m cvrunner verify --config $(CONFIG) $(ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2

test-ci: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --suite=ci

test-all: $(VENV)/.dev
	$(BIN)/python -m tests.release $(PARTS)

gpu-check: $(VENV)/.dev
	$(BIN)/python tests/gpu/gpu_check.py --device $(DEVICE) $(ARGS)

check: $(VENV)/.dev docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_layering.py

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

bench: $(VENV)/.dev
	$(BIN)/python -m tests.benchmarks

# Pretrain the demo's encoder again: about 15 minutes on two cores.
encoder: $(VENV)/.demo
	$(BIN)/python jobs/pretrain_demo_encoder.py --output cvrunner/demo_encoder

$(VENV)/.demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[demo]'
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[demo,dev]'
	touch $@

clean:
	rm -rf $(VENV) build site .mypy_cache .ruff_cache .pytest_cache
