# make run    install into .venv, then train and score one tokenizer on the embedded photographs
# make test   install into .venv, then run every test
PYTHON ?= python3
BACKBONE ?= convnext
WORKERS ?= auto

.PHONY: install run test lint
install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

run: install
	.venv/bin/python -m bench.run --backbone $(BACKBONE)

test: install
	.venv/bin/python -m pytest -m "slow or not slow" --numprocesses $(WORKERS)

lint: install
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
