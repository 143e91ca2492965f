# make demo    watch DRIFT work, in a minute and a half on two CPU cores
# make test    the whole test suite
# make test-faults        kills, full disks, changing inputs, wrong types: nine minutes of them
# make test-cuda          what needs a GPU, on the first one
# make test-distributed   DeepSpeed, on three processes
# PYTHON=python3.12 and VENV=path choose another interpreter and another virtual environment.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEEPSPEED := $(VENV)/deepspeed
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-faults test-cuda test-distributed lint clean

demo: $(INSTALLED)
	$(BIN)/drift-peft demo --out runs/demo

# A file's tests stay together: they share what was costly to make. One thread each, since there is a process per core.
# In the order of their names: by default, files of few tests would come last, and those are the slow ones.
test: $(INSTALLED)
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

test-faults: $(INSTALLED)
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/faults --faults 400

test-cuda: $(INSTALLED)
	CUDA_VISIBLE_DEVICES=0 $(BIN)/python -m pytest tests/test_cuda.py

test-distributed: $(DEEPSPEED)/.installed
	PYTHONPATH=$(abspath $(DEEPSPEED)) DS_ACCELERATOR=cpu $(BIN)/python -m pytest tests/distributed

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Installs once, and again only when the dependencies have changed.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

# Beside the environment: transformers behaves differently where it finds DeepSpeed. Its setup.py imports torch, and
# would compile kernels for a GPU.
$(DEEPSPEED)/.installed: $(INSTALLED)
	$(BIN)/python -m pip install --quiet setuptools wheel
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --no-build-isolation --no-deps -c constraints.txt \
		--target $(DEEPSPEED) deepspeed einops hjson msgpack ninja py-cpuinfo
	touch $@

clean:
	rm -rf $(VENV) runs build dist .pytest_cache .ruff_cache .hypothesis
