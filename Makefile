# Each target works on a fresh clone: it makes .venv, installs what it needs and runs.
# A stamp in .venv records what is installed, so that the second time is quick.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
INPUTS := pyproject.toml constraints.txt src/slop_hf/__init__.py
# Two test processes of one thread each; ARGS goes to pytest, as in make test ARGS="-k planner".
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal

.PHONY: help demo test check results images docs pages slow gpu constraints clean

help:  ## list the targets
	@sed -nE 's/^([a-z]+):.*## (.*)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

demo: $(VENV)/.runtime  ## plan, train, grow and report a tiny model on CPU, into runs/demo
	# PASSIVE: threads that spin while they wait are several times slower if another process needs the core.
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python recipes/demo.py --output-dir runs/demo

test: $(VENV)/.dev  ## run the tests and the doctests
	$(PYTEST) $(ARGS)

check: $(VENV)/.dev  ## lint, format check and type check
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

results: $(VENV)/.runtime  ## rebuild the results in README.md and docs/ from benchmarks/results
	$(BIN)/python benchmarks/results.py

images: $(VENV)/.runtime  ## draw the pictures of README and docs that are out of date, in seconds
	$(BIN)/python docs/images/make.py

docs: $(VENV)/.docs  ## build the documentation into site/ with Python 3.11 or later; every warning is an error
	$(BIN)/python -m sphinx -q -E -W --keep-going -d build/docs -c docs . site

pages: $(VENV)/.dev  ## run the tutorial and the notebook again, in minutes, and write their outputs into them
	$(BIN)/python docs/run_page.py docs/tutorial.md
	$(BIN)/python docs/run_page.py notebooks/quickstart.ipynb

slow: $(VENV)/.dev  ## run the tests that take minutes, and more examples of random ones
	HYPOTHESIS_PROFILE=thorough $(PYTEST) -m "slow or hypothesis" $(ARGS)

gpu:  ## measure on the first GPU, in nine minutes; installs nothing
	$(or $(wildcard $(BIN)/python),$(PYTHON)) benchmarks/gpu/run.py $(ARGS)

constraints: $(VENV)/.dev  ## pin the newest versions in constraints.txt
	$(PIP) install uv
	{ sed '/^#/!d' constraints.txt; \
	  grep '^torch==' constraints.txt | $(BIN)/uv pip compile -q --universal --python-version 3.10 --extra dev --extra docs \
	    --no-annotate --no-header pyproject.toml - | grep -vE "^(cuda-|nvidia-|triton==)|== 'emscripten'"; \
	} > constraints.txt.new
	mv constraints.txt.new constraints.txt

clean:  ## remove .venv and caches, not runs/
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist site
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# venv writes pip last: if it exists, the environment is complete.
$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: $(INPUTS) | $(BIN)/pip
	$(PIP) install -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: $(INPUTS) | $(BIN)/pip
	$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.runtime

$(VENV)/.docs: $(INPUTS) | $(BIN)/pip
	$(PIP) install -c constraints.txt -e '.[docs]'
	@touch $@ $(VENV)/.runtime
