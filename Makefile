# Plain venv and pip, nothing else: `make test PYTHON=python3.13 VENV=.venv-3.13` uses another interpreter.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Half the time of an installation is compiling bytecode, of which little is ever imported. Python writes it on import.
PIP := -m pip install -qq --disable-pip-version-check --no-compile
unexport PYTHONDONTWRITEBYTECODE
INSTALL := $(BIN)/python $(PIP)
PYTEST := $(BIN)/python -m pytest # tests/conftest.py sets the platform: 8 CPU devices

.PHONY: quickstart test test-core test-slow test-interop test-adapters bench bench-all lint docs clean
.DELETE_ON_ERROR:

quickstart: $(VENV)/installed
	$(BIN)/peftjax train --config=configs/quickstart.py --workdir=runs/quickstart

test: lint test-core

test-core: $(VENV)/installed-test
	$(PYTEST) --ignore=tests/interop -m "not slow"

test-slow: $(VENV)/installed-test
	$(PYTEST) --ignore=tests/interop -m slow

test-interop: $(VENV)/installed-interop
	$(PYTEST) tests/interop

# AdapterHub's library pins transformers 4.57, with which peft's tests cannot share an environment.
test-adapters: .venv-adapters/installed
	.venv-adapters/bin/python -m pytest -m interop tests/interop/test_adapter_hub.py

# Speed compared with PyTorch and PEFT, on an otherwise idle machine: three cells, or all of them (docs/performance.md).
bench: $(VENV)/installed .venv-peer/installed
	$(BIN)/python benchmarks/against_peft/run.py short

bench-all: $(VENV)/installed .venv-peer/installed
	$(BIN)/python benchmarks/against_peft/run.py all

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy
	$(BIN)/shellcheck launch/*.sh launch/*.sbatch

docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf .venv .venv-* build dist site .cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path "./.git/*" -prune -exec rm -rf {} +

# Stamps: a second make installs nothing, a changed pyproject.toml does.
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml | $(VENV)/bin/python
	$(INSTALL) --editable .
	touch $@

$(VENV)/installed-test: pyproject.toml | $(VENV)/bin/python
	$(INSTALL) --editable ".[test]"
	touch $@ $(VENV)/installed

$(VENV)/installed-docs: pyproject.toml | $(VENV)/bin/python
	$(INSTALL) --editable ".[docs]"
	touch $@ $(VENV)/installed

# torch first and alone: a release that this platform lacks must fail here, in one line, not in a resolver's search.
$(VENV)/installed-interop: pyproject.toml | $(VENV)/bin/python
	$(INSTALL) torch==2.13.0
	$(INSTALL) --editable ".[test,interop]"
	touch $@ $(VENV)/installed $(VENV)/installed-test

# The PyTorch side of `make bench`, without peftjax and jax.
.venv-peer/installed: Makefile
	$(PYTHON) -m venv .venv-peer
	.venv-peer/bin/python $(PIP) torch==2.13.0
	.venv-peer/bin/python $(PIP) peft==0.21.2 transformers==5.24.0 \
		bitsandbytes==0.50.2 accelerate==1.15.0
	touch $@

# This project without its bounds on transformers, huggingface-hub and tokenizers, which are older in this environment.
ADAPTERS := .venv-adapters/bin/python
OTHERS := import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	print(*[each for each in project["dependencies"] if not each.startswith(("huggingface-hub", "tokenizers", "transformers"))], sep="\n")
.venv-adapters/installed: pyproject.toml Makefile
	$(PYTHON) -m venv .venv-adapters
	$(ADAPTERS) $(PIP) torch==2.13.0
	$(ADAPTERS) -c '$(OTHERS)' > .venv-adapters/others.txt
	$(ADAPTERS) $(PIP) adapters==1.3.0 'peft>=0.21.2,<0.22' \
		'pytest>=9.2,<10' 'pytest-xdist>=3.8,<4' --requirement .venv-adapters/others.txt
	$(ADAPTERS) $(PIP) --no-deps --editable .
	touch $@
