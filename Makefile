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
	$(BIN)/python -m pytest -q

check: lint types build

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/dev
	$(BIN)/mypy

# The wheel is installed and imported in an environment of its own, against the torch and diffusers of this one.
build: .venv/dev
	rm -rf dist .venv-wheel
	$(BIN)/python -m build --outdir dist . > /dev/null
	$(PYTHON) -m venv .venv-wheel
	echo "$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])')" > \
	    "$$(.venv-wheel/bin/python -c 'import site; print(site.getsitepackages()[0])')/dependencies.pth"
	.venv-wheel/bin/pip --disable-pip-version-check install --quiet --no-deps --force-reinstall dist/*.whl
	cd dist && ../.venv-wheel/bin/python -c "import ncp_loss; assert '.venv-wheel' in ncp_loss.__file__; print('wheel:', ncp_loss.__version__)"
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
