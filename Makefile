# Every target makes the environment it needs: Python >= 3.11 with pip is enough.
PYTHON ?= python3
# The torch that `make` installs. Any torch >= 2.11 works: make test TORCH="torch==2.11.0"
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin

# The tests in two processes; make test ARGS="-n 0" runs them in one, ARGS="-n 8" in more.
PYTEST = $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: demo test kernels check paper bench clean

demo: $(VENV)/demo  ## train a classifier with LODO, AdamW and SGD side by side
	$(BIN)/python -m examples.train_classifier $(ARGS)

test: $(VENV)/ready  ## run the tests
	$(PYTEST) $(ARGS)

kernels: $(VENV)/ready  ## compile all Triton kernels for sm_90, which needs no GPU
	$(BIN)/python -m pytest -m compile $(ARGS)

check: $(VENV)/ready  ## linters, type checker, tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) $(ARGS)

.PHONY: docs
docs: $(VENV)/docs  ## build the documentation into site/, with warnings as errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

paper: $(VENV)/ready  ## run an experiment of the paper: make paper ARGS="bowl --workers 2"
	$(BIN)/python -m examples.paper $(ARGS)

bench: $(VENV)/ready  ## measure the step time
	$(BIN)/pip install --quiet -e ".[benchmarks]"
	$(BIN)/python -m benchmarks.step_time $(ARGS)

$(VENV)/demo $(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet -e ".[$(if $(filter %/demo,$@),examples,dev)]"
	touch $@

$(VENV)/docs: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet -e ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) out build dist *.egg-info
