# make demo   a small dense and a low-rank decoder on the Python standard library, samples, out/demo.png; 6 minutes on 2 CPU cores
# make test   the test suite; 7 minutes on 2 CPU cores
# make test-faults   runs that are killed, cut off, poisoned, hung and started again, many times over; 3 minutes
# All need only Python 3.11 or later and make; the first run makes .venv and installs requirements.txt into it.

PYTHON ?= python3
BIN := .venv/bin

.venv/demo: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/test: requirements-test.txt .venv/demo
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
	touch $@

demo: .venv/demo
	$(BIN)/python prepare.py stdlib
	$(BIN)/python train.py config/demo_dense.py
	$(BIN)/python train.py config/demo_lowrank.py
	$(BIN)/python sample.py --out_dir=out/demo_dense --start="def " --num_samples=1 --max_new_tokens=120
	$(BIN)/python sample.py --out_dir=out/demo_lowrank --start="def " --num_samples=1 --max_new_tokens=120
	$(BIN)/python compare.py out/demo_dense out/demo_lowrank --picture=out/demo.png

test: .venv/test
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n auto --maxprocesses=4 --dist=loadfile

test-faults: .venv/test
	$(BIN)/python -m pytest -m slow -n 2 --dist=loadfile

.PHONY: demo test test-faults
