# Every target makes the environment it needs: Python >= 3.11 with pip is enough.
PYTHON ?= python3
# The torch that `make` installs. Any torch >= 2.11 works: make test TORCH="torch==2.11.0"
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test check paper bench clean

demo: $(VENV)/demo  ## train a classifier with LODO, AdamW and SGD side by side
	$(BIN)/python -m examples.train_classifier $(ARGS)

test: $(VENV)/ready  ## run the tests
	$(BIN)/python -m pytest $(ARGS)

check: $(VENV)/ready  ## linters, type checker, tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest $(ARGS)

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

clean:
	rm -rf $(VENV) out build dist *.egg-info
