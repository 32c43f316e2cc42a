# `make quickstart` and `make test` need Python >= 3.11 and a package index, and set up everything else themselves.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
WORKDIR ?= runs/quickstart
ARGS ?=
OURS := spiral_jax experiments tests tpu  # texts to train on may lie beside them

.PHONY: quickstart test test-slow lint format docs clean

quickstart: $(VENV)/quickstart.stamp
	$(RUN) -m spiral_jax.train --config=experiments/quickstart.py --workdir=$(WORKDIR) $(ARGS)

# A file is one worker's: its fixtures are made, and its programs compiled, once. The order of tests/conftest.py.
PARALLEL := -n auto --dist=loadfile --no-loadscope-reorder

test: $(VENV)/test.stamp
	$(RUN) -m pytest $(PARALLEL) $(ARGS)

# Everything, with programs compiled as users have them.
test-slow: $(VENV)/test.stamp
	XLA_FLAGS="--xla_backend_optimization_level=3 --xla_llvm_disable_expensive_passes=false" $(RUN) -m pytest $(PARALLEL) -m "slow or not slow" $(ARGS)

lint: $(VENV)/lint.stamp
	$(RUN) -m ruff check $(OURS)
	$(RUN) -m ruff format --check $(OURS)
	$(RUN) -m mypy

format: $(VENV)/lint.stamp
	$(RUN) -m ruff check --fix $(OURS)
	$(RUN) -m ruff format $(OURS)

docs: $(VENV)/quickstart.stamp
	$(RUN) -m spiral_jax.reference > docs/config.md

clean:
	rm -rf $(VENV) build *.egg-info

$(VENV)/python.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is missing or older than Python 3.11; set PYTHON=, as in make test PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/quickstart.stamp: EXTRA := plot
$(VENV)/test.stamp: EXTRA := test
$(VENV)/lint.stamp: EXTRA := lint
$(VENV)/%.stamp: setup.cfg pyproject.toml | $(VENV)/python.stamp
	$(RUN) -m pip install --quiet --disable-pip-version-check -e '.[$(EXTRA)]'
	@touch $@
