# `make quickstart` and `make test` do all their own set-up: only Python and make are needed.
# Another interpreter: make test PYTHON=python3.12 (each version keeps its own environment).
PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
DEFAULT_VERSION := $(shell python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
VENV := $(if $(filter $(DEFAULT_VERSION),$(VERSION)),.venv,.venv-$(VERSION))
BIN := $(VENV)/bin

.PHONY: quickstart test test-slow test-aot environment test-environment lint types imports unit format clean

quickstart: $(VENV)/.quickstart
	$(BIN)/clip-jax train --config=configs/quickstart.py --workdir=runs/quickstart

test: lint types imports unit

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/mypy

imports: $(VENV)/.test
	$(BIN)/lint-imports

unit: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile

# What `make test` leaves out: more sizes, more trials, half an hour.
test-slow: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow

# Every recipe compiled for TPUs and GPUs that are not there: an hour on two cores, minutes when
# nothing has changed. Results are kept in the cache folder.
test-aot: $(VENV)/.aot
	$(BIN)/python -m pytest -n 2 --dist load -m aot tests/aot

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# A stamp is made last, so an installation that was cut short runs again, and a half-made
# environment is made afresh.
$(VENV)/.made:
	@test -n "$(VERSION)" || { echo "no Python at '$(PYTHON)': make ... PYTHON=python3.12"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, '$(PYTHON)' is $(VERSION): make ... PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.quickstart: pyproject.toml $(VENV)/.made
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[quickstart]'
	@touch $@

$(VENV)/.test: pyproject.toml $(VENV)/.made
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev,verify]'
	@touch $@ $(VENV)/.quickstart

$(VENV)/.aot: $(VENV)/.test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[plan-tpu,plan-cuda]'
	@touch $@

clean:
	rm -rf .venv .venv-* build dist *.egg-info
