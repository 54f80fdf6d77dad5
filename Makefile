# OpenHelix: `make help` lists what this does.
SHELL := /bin/bash
GPU ?=
VENV := .venv
PY := $(VENV)/bin/python
LOCK := requirements/$(if $(GPU),gpu,cpu).lock
STAMP := $(VENV)/.installed
PYTHON ?= python3.11
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
export TOKENIZERS_PARALLELISM = false
export RAY_USAGE_STATS_ENABLED = 0
# Compiled modules are kept: without them each process of a run compiles all that it imports.
unexport PYTHONDONTWRITEBYTECODE
IMPORTS = vllm.entrypoints.llm, vllm.model_executor.models.llava, ray, av, pybullet, scipy.stats

HZ2 ?= 1
STEPS ?= 60
SEQ ?= 0
SCENE ?= D
CLOCK ?= realtime
CONFIG ?= configs/run.yaml
SCENES ?= ABC
PER_TASK ?= 20
ARGS ?=
SCALE ?= laptop

.PHONY: help setup run-sim test test-slow test-gpu check format lock clean bench-runtime bench-sim bench-s1 bench-gpu bench-s2 bench-eval sweep paper data train dashboards

help: ## Show this help.
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(STAMP) ## Create .venv and install the locked packages (GPU=1 for CUDA).

$(STAMP): $(LOCK) pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "setup: $(PYTHON) is not on PATH; install Python 3.11 or say PYTHON=/path/to/python3.11"; exit 2; }
	@if command -v uv >/dev/null; then \
	  { [ -x $(PY) ] || uv venv -q --python $(PYTHON) $(VENV); } && \
	  uv pip install -q --no-deps -r $(LOCK) --python $(PY) && \
	  uv pip install -q --no-deps --no-build-isolation -e . --python $(PY); \
	else \
	  { [ -x $(PY) ] || $(PYTHON) -m venv $(VENV); } && \
	  $(PY) -m pip install -q --no-deps -r $(LOCK) && \
	  $(PY) -m pip install -q --no-deps --no-build-isolation -e .; \
	fi || { echo "setup: could not install $(LOCK); torch==2.13.0+cpu comes from PyTorch's CPU wheel index: name it in PIP_EXTRA_INDEX_URL (and UV_EXTRA_INDEX_URL), or a folder with the wheel in PIP_FIND_LINKS"; exit 2; }
	@echo "setup: compiling what a run imports"
	@$(PY) -W ignore -c "from openhelix.system2.engines.vllm_plugin import register; register(); import $(IMPORTS)" >/dev/null 2>&1 || true
	@touch $@

run-sim: setup ## Run one five-task sequence: HZ2= STEPS= SEQ= SCENE= CLOCK=realtime|lockstep CONFIG= ARGS=
	$(VENV)/bin/openhelix run --config $(CONFIG) system2.hz=$(HZ2) tasks.steps_limit=$(STEPS) \
	  tasks.sequence=$(SEQ) world.scene=$(SCENE) control.clock=$(CLOCK) $(ARGS)

# They start whole systems, one at a time. The others run two at a time with a thread each: with more
# threads than cores, each waits for the other in busy loops, and all takes three times as long.
TOGETHER = tests/integration/test_docs_commands.py
ALONE = $(filter-out $(TOGETHER),$(wildcard tests/integration/test_*.py)) tests/faults

test: setup ## Run the tests (under 15 minutes on 2 cores).
	@mkdir -p build && rm -f build/skipped.txt
	OPENHELIX_SKIPPED=$(CURDIR)/build/skipped.txt OMP_NUM_THREADS=1 \
	  $(PY) -m pytest -q -n 2 --dist loadfile -m "not slow and not gpu" tests $(foreach t,$(ALONE),--ignore $(t))
	OPENHELIX_SKIPPED=$(CURDIR)/build/skipped.txt $(PY) -m pytest -q -m "not slow and not gpu" $(ALONE)
	@if [ -s build/skipped.txt ]; then echo "skipped, and what would enable it:"; \
	  sort build/skipped.txt | uniq -c | sort -rn; else echo "skipped: nothing"; fi

test-slow: setup ## Run the slow tests too.
	HYPOTHESIS_PROFILE=search $(PY) -m pytest -q -m "not gpu" --timeout=3600 tests

test-gpu: ## Run the GPU tests (skipped with a reason where there is no GPU).
	$(PY) -m pytest -q -m gpu tests

check: setup ## Lint, types and layers.
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-cache

format: setup ## Format the code.
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

lock: ## Compile requirements/*.in into the locks (needs uv; UPGRADE=1 for newer versions).
	uv pip compile -q $(if $(UPGRADE),-U) --no-header --no-annotate --python-version 3.11 \
	  --override requirements/overrides.txt requirements/cpu.in -o requirements/cpu.lock
	UV_FIND_LINKS= uv pip compile -q $(if $(UPGRADE),-U) --no-header --no-annotate --python-version 3.11 \
	  --override requirements/overrides-gpu.txt requirements/gpu.in -o requirements/gpu.lock

bench-runtime: setup ## Wire, pacing, tick, whole-run and talking figures as JSON (leave the machine alone meanwhile).
	$(PY) -m openhelix.benchmarks.perf.bench_wire
	$(PY) -m openhelix.benchmarks.perf.bench_loop
	$(PY) -m openhelix.benchmarks.perf.bench_tick_parts --out benchmarks/perf/results/tick_parts.json
	$(PY) -m openhelix.benchmarks.perf.bench_run
	$(PY) -m openhelix.benchmarks.perf.bench_talk

bench-sim: setup ## Simulator figures as JSON, beside calvin_env where it is installed.
	$(PY) -m openhelix.benchmarks.perf.bench_sim
	$(PY) -m openhelix.benchmarks.perf.compare_worlds

bench-s1: setup ## System 1 figures as JSON.
	$(PY) -m openhelix.benchmarks.perf.bench_s1

bench-gpu: setup ## On a machine with a GPU: its tests, both systems and training, as one JSON, in eight minutes.
	$(PY) -m openhelix.benchmarks.perf.bench_gpu

bench-s2: setup ## System 2 figures as JSON.
	$(PY) -m openhelix.benchmarks.perf.bench_s2

data: setup ## Demonstrations and frames for training, in the cache (resumable): SCENES=ABC PER_TASK=20 ARGS=
	$(VENV)/bin/openhelix collect scenes=$(SCENES) per_task=$(PER_TASK) frames.system2_px=200 frames.tactile=true \
	  $(ARGS)

train: setup ## Both systems, from the data to checkpoints (resumable; docs/training.md): SCENES=ABC ARGS=
	$(VENV)/bin/openhelix train all data=demonstrations_$(SCENES) $(ARGS)

sweep: setup ## Success against the age of the latent, lockstep then wall clock (resumable): STEPS= ARGS=
	$(VENV)/bin/openhelix sweep --workers 2 --sequences 20 --episodes-per-task 1 --steps $(STEPS) \
	  --results benchmarks/results/sweep $(ARGS)
	$(VENV)/bin/openhelix sweep --clock realtime --out outputs/sweep-wall --sequences 4 \
	  --episodes-per-task 1 --tasks lift_red_block_table,lift_blue_block_table,lift_pink_block_table \
	  --patterns static,circular --steps $(STEPS) \
	  --results benchmarks/results/sweep-wall $(ARGS)

paper: setup ## Every table and figure of the paper, here (resumable; days of two cores): SCALE=quick|laptop|gpu|full ARGS=
	$(VENV)/bin/openhelix experiment all --scale $(SCALE) --workers 2 $(ARGS)

bench-eval: setup ## Evaluation figures as JSON.
	$(PY) -m openhelix.benchmarks.perf.bench_eval

.PHONY: bench-fleet
bench-fleet: setup ## Robots that one System 2 serves, and what looking on costs the loop, as JSON.
	$(PY) -m openhelix.benchmarks.perf.bench_fleet

.PHONY: faults fuzz soak
faults: setup ## Break everything in every way, and count what the arm was told (leave the machine alone): ARGS=
	$(PY) -m openhelix.benchmarks.perf.faults $(ARGS)

fuzz: setup ## A million damaged messages, and files and requests beside them: ARGS=
	$(PY) -m openhelix.benchmarks.perf.fuzz $(ARGS)

soak: setup ## Half an hour at 30 Hz: is the memory of every process flat? ARGS=
	$(PY) -m openhelix.benchmarks.perf.faults --soak 30 $(ARGS)

dashboards: setup ## Write Grafana's dashboards and docs/metrics.md from their sources.
	$(PY) -m openhelix.deploy.grafana.build
	$(PY) -m openhelix.deploy.metrics_page

clean: ## Remove outputs and caches of this checkout (not .venv).
	rm -rf outputs build .pytest_cache .mypy_cache .ruff_cache .hypothesis
