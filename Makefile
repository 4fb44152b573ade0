# Everything runs in .venv, made here; nothing needs to be installed by hand but Python 3.11-3.13.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install demo test lint bench clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "installing into $(VENV) (some minutes)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[dev,train-teacher,eval,lora,cluster]'
	@touch $@

demo: install
	@$(BIN)/dmd demo

test: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: install
	$(BIN)/python -m benchmarks.one_step

clean:
	rm -rf $(VENV) build *.egg-info
