# One line to run, one to test. The work is in scripts/; `make` alone lists the targets.
ENGINE ?= auto
PY := .venv/bin/python
SETUP := python3 scripts/setup.py --engine $(ENGINE)
# Byte code halves the start of an engine; some machines switch it off for everyone.
unexport PYTHONDONTWRITEBYTECODE
.DEFAULT_GOAL := help
.PHONY: help setup dev models run test test-fast check bench bench-ext sim load soak streams overload clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

setup:  ## .venv from the locks, extensions compiled (ENGINE=auto|cpu|cuda|simulated, TORCH_INDEX=URL)
	@$(SETUP)

models: setup  ## the four demo models in .models/
	@$(if $(filter simulated,$(ENGINE)),,$(PY) scripts/make_demo_models.py)

run: models  ## serve configs/demo.toml on 127.0.0.1:8080 (ENGINE=simulated needs no vLLM)
	@exec $(PY) -m proxy.cli serve --config configs/demo.toml --engine $(if $(filter simulated,$(ENGINE)),simulated,auto)

dev:
	@$(SETUP) --dev

test: dev  ## all tests, those on real vLLM included
	@$(if $(filter simulated,$(ENGINE)),,$(PY) scripts/make_demo_models.py)
	@$(PY) -m pytest $(if $(filter simulated,$(ENGINE)),-m "not engine")

test-fast:  ## tests that need no engine and no patience
	@python3 scripts/setup.py --engine none --dev && $(PY) -m pytest -m "not engine and not long"

check:  ## ruff, mypy, cython-lint, architecture
	@python3 scripts/setup.py --engine none --dev && $(PY) scripts/check.py

bench: dev  ## CPU per request, per chunk and per event of the scheduler, printed
	@$(PY) -m loadtests.bench
	@$(PY) -m loadtests.bench_core

bench-ext: dev  ## native extensions against their Python twins, printed
	@$(PY) loadtests/bench_ext.py

sim: dev  ## policies against the optimum, printed (TRACES=FOLDER)
	@$(PY) loadtests/sim.py $(TRACES)

load: dev  ## locust against a running vramp (HOST=URL)
	@$(PY) -m locust -f loadtests/locustfile.py --host $(or $(HOST),http://127.0.0.1:8080) --headless --only-summary -u 20 -r 5 -t 60s

soak: dev  ## half an hour of everything, and whether anything grows (MINUTES=30)
	@$(PY) -m loadtests.soak --minutes $(or $(MINUTES),30)

streams: dev  ## ten thousand streams at once, every event checked
	@$(PY) -m loadtests.streams

overload: dev  ## five times what an engine can do
	@$(PY) -m loadtests.overload

clean:  ## remove .venv, .models, .state and everything built
	@rm -rf .venv .models .state build dist *.egg-info ext/*.so ext/*.c ext/*.cpp .mypy_cache .ruff_cache .pytest_cache .hypothesis
