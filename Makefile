# make demo: set up, run the default study, print where its report is.   make test: set up, run the tests.
# make docs: set up, build the documentation, print where it is.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed
JOBS ?= 2

.PHONY: demo test lowest docs lint notebooks mutants clean

demo: $(STAMP)
	$(BIN)/probe study --folder runs/demo

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

# The doors of the package with the oldest of everything that pyproject.toml admits, in an environment of its own.
LOWEST = .venv-lowest
lowest:
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python tests/support/lower_bounds.py > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check -c $(LOWEST)/constraints.txt torch
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check -c $(LOWEST)/constraints.txt \
	    -e ".[figures]" pytest pytest-xdist hypothesis beartype psutil
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -n $(JOBS) --dist loadfile \
	    -o addopts="--import-mode=importlib --strict-markers" -o filterwarnings= \
	    tests/test_tracing.py tests/test_cli.py tests/report tests/models/test_lens.py tests/models/test_pretrained.py \
	    tests/position/probes/test_ridge.py tests/position/edits/test_subspaces.py

docs: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -W --keep-going -n -q -b html docs docs/_build/html
	@echo docs/_build/html/index.html

# All of them, or NAMES="01_… 05_…": run anew, their figures kept as pictures. Wants a Chromium or Chrome.
notebooks: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python tests/support/refresh_notebooks.py $(NAMES)

# Changes of the code that no test notices, in all groups or GROUPS="distances …"; SAMPLE=30 for so many of each file.
mutants: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python tests/support/mutants.py --jobs $(JOBS) $(if $(SAMPLE),--sample $(SAMPLE)) $(GROUPS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is wanted: make PYTHON=python3.11')"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) $(LOWEST) *.egg-info
