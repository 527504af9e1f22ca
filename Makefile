# One environment in the checkout, one test command. `make setup` is idempotent: it runs again only when something that
# the environment is built from has changed.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.ready
SOURCES := pyproject.toml $(shell find csrc -type f \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name CMakeLists.txt \))
TORCH ?= torch==2.13.0
# A file's tests stay on one worker, since many share what is expensive to make. In order of the folders, because xdist
# would put files of few tests last, and those of few tests are the long ones.
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: setup test demo parity-table lattice-table lint format types imports docs check clean
.DEFAULT_GOAL := setup

setup: $(STAMP)

$(STAMP): $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' \
	  || { echo "moetrain needs Python 3.11 or 3.12; found $$($(PYTHON) --version). Set PYTHON=..."; exit 2; }
	@command -v $${CXX:-c++} >/dev/null || { echo "moetrain needs a C++17 compiler (CXX)"; exit 2; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --upgrade pip
	$(PY) -m pip install -q "$(TORCH)" numpy ninja cmake setuptools wheel packaging "scikit-build-core>=0.11,<2" psutil py-cpuinfo
	# torch must be there first and seen by the builds: DeepSpeed's ops and ours compile against it.
	@echo "compiling DeepSpeed's CPU Adam (about two minutes, once)"
	@# Compiled now, because nothing may compile when training starts; and for this processor, so not from a cache that
	@# other machines share. Without it (no Python headers, say) torch's own fused AdamW is used.
	DS_BUILD_OPS=0 DS_BUILD_CPU_ADAM=1 $(PY) -m pip install -q --no-cache-dir --no-build-isolation deepspeed==0.19.8 \
	  || DS_BUILD_OPS=0 $(PY) -m pip install -q --no-build-isolation deepspeed==0.19.8
	$(PY) -m pip install -q --no-build-isolation -e ".[dev]"
	touch $(STAMP)

test: setup
	OMP_NUM_THREADS=1 $(PY) -m pytest $(PYTEST_ARGS)

demo: setup
	$(PY) -m moetrain demo $(DEMO_ARGS)

parity-table: setup
	OMP_NUM_THREADS=1 MOETRAIN_WRITE_TABLES=1 $(PY) -m pytest -q tests/distributed/test_layout_parity.py

lattice-table: setup
	OMP_NUM_THREADS=1 MOETRAIN_WRITE_TABLES=1 $(PY) -m pytest -q tests/distributed/test_lattice.py

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: setup
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

types: setup
	$(VENV)/bin/pyright

imports: setup
	PYTHONPATH=. $(VENV)/bin/lint-imports

docs: setup
	$(PY) -m sphinx -b html -W --keep-going -q docs docs/_build

check: lint types imports docs

clean:
	rm -rf $(VENV) build dist runs
