PYTHON ?= python3
BIN = .venv/bin

.PHONY: setup demo test

setup: .venv/ready

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement requirements.txt
	touch $@

demo: setup
	$(BIN)/python mms_train.py --demo
	$(BIN)/python inference_mms.py --run runs/mms_demo

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal
