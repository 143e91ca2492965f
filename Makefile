# make demo    watch DRIFT work, in a minute and a half on two CPU cores
# make test    the whole test suite
# make test-cuda          what needs a GPU, on the first one
# make test-distributed   DeepSpeed, on three processes
# make test-integrations  a few steps of axolotl, LLaMA-Factory, ms-swift and Unsloth, each beside the environment
# PYTHON=python3.12 and VENV=path choose another interpreter and another virtual environment.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEEPSPEED := $(VENV)/deepspeed
INTEGRATIONS := $(VENV)/integrations
TOOLS := axolotl llama_factory ms_swift unsloth
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-cuda test-distributed test-integrations lint clean

demo: $(INSTALLED)
	$(BIN)/drift-peft demo --out runs/demo

# A file's tests stay together: they share what was costly to make. One thread each, since there is a process per core.
# In the order of their names: by default, files of few tests would come last, and those are the slow ones.
test: $(INSTALLED)
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

test-cuda: $(INSTALLED)
	CUDA_VISIBLE_DEVICES=0 $(BIN)/python -m pytest tests/test_cuda.py

test-distributed: $(DEEPSPEED)/.installed
	PYTHONPATH=$(abspath $(DEEPSPEED)) DS_ACCELERATOR=cpu $(BIN)/python -m pytest tests/distributed

# A process for each: they patch transformers, and bring TRL in different versions.
test-integrations: $(TOOLS:%=$(INTEGRATIONS)/%/.installed)
	for tool in $(TOOLS); do \
		PYTHONPATH=$(abspath $(INTEGRATIONS))/$$tool CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 \
			$(BIN)/python -m pytest tests/integrations/test_$$tool.py || exit 1; \
	done

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

# Without their dependencies, which are in the list as far as a step on a CPU needs them: torchvision, xformers and
# others come for CUDA alone.
$(INTEGRATIONS)/%/.installed: tests/integrations/%.txt $(INSTALLED)
	rm -rf $(@D)
	$(BIN)/python -m pip install --quiet --no-deps --target $(@D) -r $<
	touch $@

clean:
	rm -rf $(VENV) runs build dist .pytest_cache .ruff_cache .hypothesis
