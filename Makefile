# make demo   English text, the recipe dense and with low-rank queries and keys, nanoGPT's recipe: two minutes each on 2 CPU cores,
#             samples, a table, out/demo.png; 8 minutes in all at most
# make test   the test suite; 5 minutes on 2 CPU cores
# make test-all   its longer tests; 5 minutes on 2 CPU cores
# make test-faults   runs that are killed, cut off, poisoned, hung and started again, many times over; 3 minutes
# make test-oldest   the core's tests with the oldest torch that minnow supports, which it installs into .venv-oldest; 3 minutes on
# 2 CPU cores
# All need only Python 3.11 or later and make; the first run makes .venv and installs requirements.txt into it.

PYTHON ?= python3
BIN := .venv/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check

# $(call cpu_torch,python,version): on Linux without an NVIDIA GPU install PyTorch's CPU wheel, a tenth of the one with CUDA.
# Where PyTorch's own index cannot be reached, what comes next takes torch from pip's default index
CPU_WHEELS := https://download.pytorch.org/whl/cpu
cpu_torch = if test "$$(uname -s)" = Linux && ! nvidia-smi -L > /dev/null 2>&1; then \
		echo "torch $(2): the CPU wheel"; \
		$(1) -m pip install --quiet --disable-pip-version-check --no-deps --timeout 10 --retries 0 \
			--index-url $(CPU_WHEELS) torch==$(2) || echo "torch: not from $(CPU_WHEELS), but from the default index"; \
	fi
TORCH := $(shell sed -n 's/^torch==\([0-9.]*\).*/\1/p' requirements.txt)

.venv/demo: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(call cpu_torch,$(BIN)/python,$(TORCH))
	$(PIP) -r requirements.txt
	touch $@

.venv/test: requirements-test.txt .venv/demo
	$(PIP) -r requirements-test.txt
	touch $@

# The text: Shakespeare where it can be downloaded, with little patience; else the documentation of this machine's Python
FETCH = $(BIN)/python -c "from features.text import download as d; d.TRIES, d.TIMEOUT = 1, 10; d.download_corpus('shakespeare')"

data/demo/meta.json: | .venv/demo
	@if $(FETCH) 2> /dev/null; then \
		echo "text: Shakespeare" && \
		$(BIN)/python prepare.py shakespeare --tokenizer=bpe:2048 --out=data/demo; \
	else \
		echo "text: the documentation of Python's standard library, as Shakespeare could not be downloaded" && \
		$(BIN)/python prepare.py stdlib_docs --tokenizer=bpe:2048 --out=data/demo; \
	fi

# The same minutes for all. On a fast machine they are shorter: 400 steps read Shakespeare two and a half times, and more would
# learn it by heart
MINUTES := 2
TRAIN = $(BIN)/python train.py --minutes=$(MINUTES)
SAMPLE := --num_samples=1 --max_new_tokens=150 --temperature=0.7 --top_k=50

demo: data/demo/meta.json
	$(TRAIN) config/demo_dense.py
	$(TRAIN) config/demo_lowrank.py
	$(TRAIN) config/demo_nanogpt.py
	@grep -q shakespeare data/demo/meta.json && start='KING RICHARD:' || start='Return the'; \
	for run in dense lowrank; do \
		echo "=== out/demo_$$run"; \
		$(BIN)/python sample.py --out_dir=out/demo_$$run --start="$$start" $(SAMPLE) || exit 1; \
	done
	$(BIN)/python compare.py out/demo_nanogpt out/demo_dense out/demo_lowrank --picture=out/demo.png
	@echo
	@echo "Try next:"
	@echo "  $(BIN)/python sample.py --out_dir=out/demo_lowrank --start='Say something'"
	@echo "  $(BIN)/python analyze.py weights --out_dir=out/demo_dense             # has it a low rank already?"
	@echo "  $(BIN)/python prepare.py YOUR_TEXT.txt --out=data/mine && $(BIN)/python train.py --minutes=5 --dataset=mine --out_dir=out/mine"

test: .venv/test
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n auto --maxprocesses=4 --dist=loadfile

test-all: .venv/test
	$(BIN)/python -m pytest -m full -n auto --maxprocesses=4 --dist=load

test-faults: .venv/test
	$(BIN)/python -m pytest -m slow -n 2 --dist=loadfile

# The oldest torch that is supported (OLDEST_TORCH in configurator.py), without lm-eval, which these tests do not need.
OLDEST := .venv-oldest
CORE := model train batches optim checkpoint sample configurator growth lora moe packed device objectives markov \
        distill packing eval prepare tokenizer deletable

$(OLDEST)/ready: requirements.txt requirements-test.txt Makefile
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	sed 's/^torch==[0-9.]*/torch==2.11.0/' requirements.txt > $(OLDEST)/requirements.txt
	grep -v '^-r\|^lm-eval\|^ruff' requirements-test.txt >> $(OLDEST)/requirements.txt
	@$(call cpu_torch,$(OLDEST)/bin/python,2.11.0)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -r $(OLDEST)/requirements.txt
	touch $@

test-oldest: $(OLDEST)/ready
	$(OLDEST)/bin/python -m pytest -n auto --maxprocesses=4 --dist=loadfile $(CORE:%=tests/test_%.py)

.PHONY: demo test test-all test-faults test-oldest
