# Two commands set everything up on a machine with Python 3.11 and make:  make demo   make test
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet
# Each worker begins with a half of the files, so that what a file's tests share is mostly made once.
WORKERS = -n 2 --dist worksteal
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test test-quick test-deepspeed check lint types docs build release-check clean

demo: .venv/demo
	$(BIN)/python -m examples.demo --out demo

test: .venv/dev
	$(BIN)/python -m pytest -q $(WORKERS)

# All but what trains, compiles for other machines or starts many processes: for those who work on the core.
test-quick: .venv/dev
	$(BIN)/python -m pytest -q $(WORKERS) -m "not slow"

# DeepSpeed has an environment of its own, on top of .venv: accelerate imports it wherever it finds it.
test-deepspeed: .venv-deepspeed/ready
	.venv-deepspeed/bin/python -m pytest -q tests/test_distributed.py -k deepspeed

check: lint types docs build

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
	.venv-wheel/bin/pip --disable-pip-version-check install --quiet -c $(CONSTRAINTS) torch
	.venv-wheel/bin/pip --disable-pip-version-check install --quiet -c $(CONSTRAINTS) dist/*.whl
	cd dist && ../.venv-wheel/bin/python -c "import ncp_loss; print('wheel', ncp_loss.__version__, 'imports')"
	rm -rf .venv-wheel

# Strict: a warning is an error. Nothing is fetched while the pages are built or read.
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "docs built: site/index.html"

# What will be published: checked, installed as a user would, and used outside of the source tree.
release-check: .venv/dev
	rm -rf dist .venv-wheel .release
	$(BIN)/python -m build --outdir dist . > /dev/null
	$(BIN)/twine check --strict dist/*
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/pip --disable-pip-version-check install --quiet -c $(CONSTRAINTS) torch
	.venv-wheel/bin/pip --disable-pip-version-check install --quiet -c $(CONSTRAINTS) "$$(echo dist/*.whl)[demo]"
	mkdir .release && cp -r examples .release/
	cd .release && ../.venv-wheel/bin/python -c "import ncp_loss; assert 'site-packages' in ncp_loss.__file__"
	cd .release && ../.venv-wheel/bin/python -m examples.demo --out demo $(DEMO)
	rm -rf .venv-wheel .release

# torch goes first and alone, so that no other package's range chooses another build of it.
.venv/torch: $(CONSTRAINTS)
	$(PYTHON) -m venv .venv
	$(PIP) -c $(CONSTRAINTS) torch
	touch $@

.venv/demo: .venv/torch pyproject.toml
	$(PIP) -c $(CONSTRAINTS) -e '.[demo]'
	touch $@

.venv/dev: .venv/torch pyproject.toml
	$(PIP) -c $(CONSTRAINTS) -e '.[dev]'
	touch $@ .venv/demo

.venv/docs: .venv/torch pyproject.toml
	$(PIP) -c $(CONSTRAINTS) -e '.[docs]'
	touch $@

# Nothing is compiled when it is installed, and what it builds with, torch, is there already.
.venv-deepspeed/ready: .venv/dev
	$(PYTHON) -m venv .venv-deepspeed
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > "$$(echo .venv-deepspeed/lib/python*/site-packages)/venv.pth"
	.venv-deepspeed/bin/pip --disable-pip-version-check install --quiet -c $(CONSTRAINTS) setuptools wheel ninja py-cpuinfo
	DS_BUILD_OPS=0 .venv-deepspeed/bin/pip --disable-pip-version-check install --quiet -c $(CONSTRAINTS) --no-build-isolation deepspeed
	touch $@

clean:
	rm -rf .venv .venv-wheel .venv-deepspeed .release dist site demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
