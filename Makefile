# make quickstart         train a tiny model on this interpreter's standard library
# make test               run the tests
# make test-distributed   run all tests on several ranks, of which the former has a few; about 20 minutes
# make test-interchange   run all tests of exports and imports, compiled and on two processes too; about 10 minutes
# make test-serve         run all tests of the server, with 1,000 and 10,000 requests too; about 4 minutes
# make test-health        break 35 things in small runs, and see what the rules of run health find; about 15 minutes
# make faults             kill runs, damage checkpoints and feed every reader nonsense, many times; about 25 minutes
# make test-long          run the long forms of the tests of commands, data and training; about two minutes
# make test-oldest        run the tests with the oldest accepted dependencies, in .venv-oldest
# make check              linter, format and types
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test test-distributed test-interchange test-serve test-health test-long faults test-oldest check format clean

quickstart: .venv/installed
	@echo "p828 is in .venv/bin; 'source .venv/bin/activate' puts it on the path of a shell."
	$(BIN)/p828 train quickstart

test: .venv/installed-dev
	$(BIN)/pytest -n 2 --dist loadgroup

test-distributed: .venv/installed-dev
	$(BIN)/pytest tests/distributed tests/bench/test_scaling.py -m "long or not long"

test-interchange: .venv/installed-dev
	$(BIN)/pytest tests/interchange -m "long or not long"

test-serve: .venv/installed-dev
	$(BIN)/pytest tests/serve -m "long or not long"

test-health: .venv/installed-dev
	$(BIN)/pytest tests/health -m "long or not long" -s

test-long: .venv/installed-dev
	$(BIN)/pytest tests/cli tests/data tests/train -m long

faults: .venv/installed-dev
	$(BIN)/pytest tests/faults -m "long or not long"
	FUZZ_EXAMPLES=5000 $(BIN)/pytest tests/fuzz -n 2

test-oldest: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install -qq --disable-pip-version-check --constraint constraints-oldest.txt --editable '.[dev]'
	.venv-oldest/bin/pytest -n 2 --dist loadgroup

check: .venv/installed-dev
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed-dev
	$(BIN)/ruff check --no-cache --fix .
	$(BIN)/ruff format .

.venv/bin/python:
	@$(PYTHON) -m venv .venv || { rm -rf .venv; echo "On Debian: apt install python3-venv" >&2; exit 1; }

.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	@echo "Installing into .venv; PyTorch is large, this takes some minutes."
	@$(BIN)/pip install -qq --disable-pip-version-check --constraint constraints.txt --editable .
	@touch $@

.venv/installed-dev: pyproject.toml constraints.txt | .venv/bin/python
	@echo "Installing into .venv; PyTorch is large, this takes some minutes."
	@$(BIN)/pip install -qq --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@ .venv/installed

clean:
	rm -rf .venv .venv-oldest build src/*.egg-info .pytest_cache .ruff_cache .mypy_cache
