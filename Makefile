# make demo   a small dense and a low-rank decoder on the Python standard library, samples, out/demo.png; 6 minutes on 2 CPU cores
# make test   the test suite; 7 minutes on 2 CPU cores
# make test-faults   runs that are killed, cut off, poisoned, hung and started again, many times over; 3 minutes
# make test-oldest   the core's tests with the oldest torch that minnow supports, which it installs into .venv-oldest; 3 minutes on
# 2 CPU cores
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

# The oldest torch that is supported (OLDEST_TORCH in configurator.py), without lm-eval, which these tests do not need.
OLDEST := .venv-oldest
CORE := model train data optim checkpoint sample configurator growth lora moe packed device objectives markov distill packing \
        eval prepare tokenizer

$(OLDEST)/ready: requirements.txt requirements-test.txt Makefile
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	sed 's/^torch==[0-9.]*/torch==2.11.0/' requirements.txt > $(OLDEST)/requirements.txt
	grep -v '^-r\|^lm-eval\|^ruff' requirements-test.txt >> $(OLDEST)/requirements.txt
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -r $(OLDEST)/requirements.txt
	touch $@

test-oldest: $(OLDEST)/ready
	$(OLDEST)/bin/python -m pytest -n auto --maxprocesses=4 --dist=loadfile $(CORE:%=tests/test_%.py)

.PHONY: demo test test-faults test-oldest
