# Two commands set everything up on a machine with Python 3.11 and make:  make demo   make test
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test check lint types build clean

demo: .venv/demo
	$(BIN)/python -m examples.demo --out demo

test: .venv/dev
	$(BIN)/python -m pytest -q -n 2

check: lint types build

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/dev
	$(BIN)/mypy

# The wheel, built from the sdist, is installed with what it asks for, and imported, in an environment of its own.
build: .venv/dev
	rm -rf dist .venv-wheel
	$(BIN)/python -m build --outdir dist . > /dev/null
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/pip --disable-pip-version-check install --quiet -c constraints.txt torch
	.venv-wheel/bin/pip --disable-pip-version-check install --quiet -c constraints.txt dist/*.whl
	cd dist && ../.venv-wheel/bin/python -c "import ncp_loss; print('wheel', ncp_loss.__version__, 'imports')"
	rm -rf .venv-wheel

# torch goes first and alone, so that no other package's range chooses another build of it.
.venv/torch: constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) -c constraints.txt torch
	touch $@

.venv/demo: .venv/torch pyproject.toml
	$(PIP) -c constraints.txt -e '.[demo]'
	touch $@

.venv/dev: .venv/torch pyproject.toml
	$(PIP) -c constraints.txt -e '.[dev]'
	touch $@ .venv/demo

clean:
	rm -rf .venv .venv-wheel dist demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
