# Every target makes the virtual environment it needs. PYTHON chooses the
# interpreter: make test PYTHON=python3.13
PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?= -n auto --maxprocesses 8
BENCH_ARGS ?=
TRUST_ARGS ?=
# What `make versions` tests: interpreters, and of JAX the oldest and the newest.
PYTHONS ?= python3.11 python3.12 python3.13
JAX ?= oldest newest
PROPERTIES := tests/test_properties.py
NOTEBOOKS ?= logits one_function digits classifiers language_model policy_gradient \
  distillation sharding your_own

BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo distillation language-model policy-gradient quick test test-long \
  fuzz versions trust bench lint notebooks docs docs-test clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.demo  ## Train a classifier of handwritten digits
	$(BIN)/python notebooks/digits.py

language-model: $(VENV)/.demo  ## Train a small language model; ARGS=--quick for a try-out
	$(BIN)/python notebooks/language_model.py $(ARGS)

policy-gradient: $(VENV)/.demo  ## Train a small policy by rewards; the same ARGS
	$(BIN)/python notebooks/policy_gradient.py $(ARGS)

distillation: $(VENV)/.demo  ## Train a small model by a larger one; the same ARGS
	$(BIN)/python notebooks/distillation.py $(ARGS)

quick: $(VENV)/.demo  ## Run every notebook as a script, in a few minutes
	for name in $(NOTEBOOKS); do echo "== $$name"; \
	  MPLBACKEND=agg $(BIN)/python notebooks/$$name.py --quick || exit 1; done

test: $(VENV)/.test  ## Run the tests and the examples in docstrings and README
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-long: $(VENV)/.test  ## Run what sweeps longer: all options, dtypes and sizes
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m long
	$(BIN)/python -m pytest $(PYTEST_ARGS) --hypothesis-profile long $(PROPERTIES)

fuzz: $(VENV)/.test  ## Draw new calls without end, until one is wrong
	while $(BIN)/python -m pytest $(PYTEST_ARGS) --hypothesis-profile fuzz \
	  $(PROPERTIES); do :; done

versions:  ## Run the tests on each Python and JAX; PYTHONS and JAX choose
	mkdir -p build
	floor=$$(sed -n 's/^ *"jax>=\([0-9.]*\)".*/\1/p' pyproject.toml); \
	  test -n "$$floor" && printf 'jax==%s\njaxlib==%s\n' $$floor $$floor > build/oldest.txt
	: > build/newest.txt
	for python in $(PYTHONS); do for jax in $(JAX); do \
	  echo "== $$python, $$jax JAX"; \
	  PIP_CONSTRAINT=$(CURDIR)/build/$$jax.txt $(MAKE) test PYTHON=$$python \
	    VENV=build/$$python-$$jax || exit 1; done; done

trust: $(VENV)/.trust  ## Measure what a long run may rely on: memory, bits, the package
	$(BIN)/python -m benchmarks trust $(TRUST_ARGS)
	$(BIN)/python -m benchmarks report

# PyTorch and TensorFlow take part where they are installed into $(VENV).
bench: $(VENV)/.bench  ## Measure time, memory and accuracy beside other libraries
	$(BIN)/python -m benchmarks run $(BENCH_ARGS)
	$(BIN)/python -m benchmarks report

lint: $(VENV)/.dev  ## Check style, formatting and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

notebooks: $(VENV)/.notebooks  ## Execute the notebooks from their .py sources
	$(BIN)/jupytext --update --to ipynb $(NOTEBOOKS:%=notebooks/%.py)
	$(BIN)/jupyter nbconvert --to notebook --inplace --execute \
	  --ExecutePreprocessor.record_timing=False $(NOTEBOOKS:%=notebooks/%.ipynb)
	$(BIN)/jupyter nbconvert --to notebook --inplace --coalesce-streams \
	  $(NOTEBOOKS:%=notebooks/%.ipynb)

docs: $(VENV)/.docs  ## Build the site from the notebooks: build/site/index.html
	$(BIN)/python -m sphinx -W --keep-going -q -c notebooks . build/site

docs-test: docs  ## Follow its links and, where there is a browser, look at its pages
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m site tests/test_site.py

clean:  ## Remove the environment and everything that was generated
	rm -rf $(VENV) build dist notebooks/figures notebooks/generated
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Debian splits ensurepip from python3; pip can then install itself into the
# environment from outside.
$(BIN)/pip:
	$(PYTHON) -m venv $(VENV) || { \
	  $(PYTHON) -m venv --clear --without-pip $(VENV) && \
	  $(PYTHON) -m pip --python $(BIN)/python install pip; }

# One stamp per set of extras, older than pyproject.toml when it must be redone.
$(VENV)/.%: pyproject.toml | $(BIN)/pip
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	@touch $@
