# Everything runs in .venv, which the targets make themselves. Needed before: Python 3.10 or newer, and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
# An environment is ready when its stamps exist. The first one's name changes with the folder, which an environment's
# scripts name, the others' with what should be installed as well.
MADE := $(VENV)/.made-$(shell pwd | cksum | cut -d' ' -f1)
KEY := $(shell { pwd; cat pyproject.toml constraints.txt; } | cksum | cut -d' ' -f1)
USER_READY := $(VENV)/.ready-user-$(KEY)
DEV_READY := $(VENV)/.ready-dev-$(KEY)

RECIPE ?= examples/demo/recipe.yaml
OUTPUT ?= runs/demo
WORKERS ?= 2
TESTS ?=
M ?=
TIER ?= quick

.PHONY: help demo test lint type pytest evidence bench docs readme new-method clean
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# One environment, one installer: `make -j2 demo docs` would run two.
.NOTPARALLEL:

help:
	@echo "make demo         compare a dozen ways to give a small model new facts; report in $(OUTPUT)"
	@echo "make test         lint, types, layers and the whole test suite"
	@echo "make lint type    the checks alone"
	@echo "make evidence     measure claims again: M=<slug> (all methods if left out), TIER=quick|full"
	@echo "make bench        speed and memory beside other libraries"
	@echo "make docs         build the site into site/"
	@echo "make readme       write the table of methods in README.md from the evidence records"
	@echo "make new-method   FAMILY=<family> NAME=<name>: module, test and evidence recipe to fill in"
	@echo "make clean        remove what the targets made, the environment included"

$(MADE):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "error: $(PYTHON) is missing or older than 3.10; install one, or name another: make PYTHON=python3.11" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "error: $(PYTHON) cannot make environments; on Debian: apt-get install python3-venv" >&2; exit 2; }
	$(PYTHON) -m venv $(if $(wildcard $(VENV)/.made-*),--clear) $(VENV)
	@touch $@

# torch first and by its exact version, so that one build of it is chosen before anything else asks for it.
define install
@echo "setting up $(VENV) ($(1)); this is done once"
@$(PIP) install $$(grep '^torch==' constraints.txt)
@$(PIP) install -c constraints.txt hatchling editables setuptools
@$(PIP) install --no-build-isolation -c constraints.txt -e '.[$(1)]'
@touch $@
endef

$(DEV_READY): | $(MADE)
	$(call install,dev)
	@touch $(USER_READY)

$(USER_READY): | $(MADE)
	$(call install,all)

demo: $(USER_READY)
	$(BIN)/transfuse compare $(RECIPE) --output $(OUTPUT)

test: lint type pytest

lint: $(DEV_READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

type: $(DEV_READY)
	$(BIN)/mypy

# One thread per worker: two workers share the cores.
pytest: $(DEV_READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(TESTS)

evidence: $(USER_READY)
	@for slug in $(or $(M),$$($(BIN)/python -c "import transfuse; print(*(m.slug for m in transfuse.methods()))")); do \
	  $(BIN)/transfuse evidence $$slug $(if $(filter full,$(TIER)),--full) || exit $$?; done

bench: $(DEV_READY)
	@$(PIP) install --no-build-isolation -c constraints.txt -e '.[bench]'
	@for file in $(wildcard benchmarks/[!_]*.py); do echo "== $$file"; $(BIN)/python $$file || exit $$?; done

docs: $(DEV_READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

readme: $(DEV_READY)
	$(BIN)/python scripts/pages.py

new-method:
	@$(PYTHON) scripts/new_method.py "$(FAMILY)" "$(NAME)"

clean:
	rm -rf $(VENV) site dist runs/demo .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests evidence scripts benchmarks docs -name __pycache__ -type d -prune -exec rm -rf {} +
