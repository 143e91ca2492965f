# make demo    watch DRIFT work, in a minute and a half on two CPU cores
# make test    the whole test suite
# make test-slow          the slow tests, on top of that: many seconds each
# make test-faults        kills, full disks, changing inputs, wrong types: nine minutes of them
# make test-cuda          what needs a GPU, on the first one
# make test-distributed   DeepSpeed, on three processes
# make mutants  faults put into the code, one at a time: which do the tests see? FILES="tuner/step prior/svd" SAMPLE=30
# make test-integrations  a few steps of axolotl, LLaMA-Factory, ms-swift and Unsloth, each beside the environment
# make test-peft          PEFT's own LoRA tests, with drift_peft imported and with DriftConfig in LoraConfig's place
# make test-oldest        the test suite with the lowest versions that pyproject.toml allows, in .venv-oldest
# make test-newest        the same with the newest ones, in .venv-newest
# make docs     the documentation in build/site, without network; a link that leads nowhere is an error
# make dist     wheel and source distribution in dist/, checked for an index of packages
# PYTHON=python3.12 and VENV=path choose another interpreter and another virtual environment.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEEPSPEED := $(VENV)/deepspeed
MUTMUT := $(VENV)/mutmut
INTEGRATIONS := $(VENV)/integrations
PEFT_SUITE := $(VENV)/peft-suite
TOOLS := axolotl llama_factory ms_swift unsloth
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-slow test-faults test-cuda test-distributed mutants test-integrations test-peft test-oldest test-newest
.PHONY: run-in lint docs dist clean

demo: $(INSTALLED)
	$(BIN)/drift-peft demo --out runs/demo

# A file's tests stay together: they share what was costly to make. One thread each, since there is a process per core.
# In the order of their names: by default, files of few tests would come last, and those are the slow ones. With
# bytecode, whatever the environment says: the tests start hundreds of processes, and each would compile all anew.
test: $(INSTALLED)
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

test-slow: $(INSTALLED)
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --slow -m slow

test-faults: $(INSTALLED)
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/faults --faults 400

test-cuda: $(INSTALLED)
	CUDA_VISIBLE_DEVICES=0 $(BIN)/python -m pytest tests/test_cuda.py

test-distributed: $(DEEPSPEED)/.installed
	PYTHONPATH=$(abspath $(DEEPSPEED)) DS_ACCELERATOR=cpu $(BIN)/python -m pytest tests/distributed

test-peft: $(PEFT_SUITE)/.fetched
	PYTHONPATH=$(abspath $(PEFT_SUITE))/needs $(BIN)/python tests/peft_suite/run.py $(PEFT_SUITE)/peft

mutants: $(MUTMUT)/.installed
	PYTHONPATH=$(abspath $(MUTMUT)) CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 \
		$(BIN)/python benchmarks/mutants.py $(if $(SAMPLE),--sample $(SAMPLE)) $(if $(SEED),--seed $(SEED)) $(FILES)

# Environments of their own. What an older version lacks is skipped, and -rs says which test and why.
test-oldest: .venv-oldest/.installed
	$(MAKE) run-in ENVIRONMENT=.venv-oldest

test-newest: .venv-newest/.installed
	$(MAKE) run-in ENVIRONMENT=.venv-newest

run-in:
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(ENVIRONMENT)/bin/python -m pytest --numprocesses auto --dist loadfile \
		--no-loadscope-reorder -rs

# A process for each: they patch transformers, and bring TRL in different versions.
test-integrations: $(TOOLS:%=$(INTEGRATIONS)/%/.installed)
	for tool in $(TOOLS); do \
		PYTHONPATH=$(abspath $(INTEGRATIONS))/$$tool CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 \
			$(BIN)/python -m pytest tests/integrations/test_$$tool.py || exit 1; \
	done

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/ty check --python $(VENV)

# The notice is about a successor of the theme.
docs: $(INSTALLED)
	CUDA_VISIBLE_DEVICES= NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

dist: $(INSTALLED)
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist
	$(BIN)/twine check --strict dist/*

# Installs once, and again only when the dependencies have changed.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

.venv-oldest/.installed: pyproject.toml constraints-oldest.txt
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet -c constraints-oldest.txt -e ".[test]"
	touch $@

# The newest of everything but torch, whose newest build may be one for GPUs alone.
.venv-newest/.installed: pyproject.toml constraints.txt
	test -x .venv-newest/bin/python || $(PYTHON) -m venv .venv-newest
	grep '^torch==' constraints.txt > .venv-newest/torch.txt
	.venv-newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager -c .venv-newest/torch.txt -e ".[test]"
	touch $@

# Beside the environment: transformers behaves differently where it finds DeepSpeed. Its setup.py imports torch, and
# would compile kernels for a GPU.
$(DEEPSPEED)/.installed: $(INSTALLED)
	$(BIN)/python -m pip install --quiet setuptools wheel
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --no-build-isolation --no-deps -c constraints.txt \
		--target $(DEEPSPEED) deepspeed einops hjson msgpack ninja py-cpuinfo
	touch $@

# Beside the environment, and without the rest of its dependencies: what makes mutants needs none of its interface.
$(MUTMUT)/.installed: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt --target $(MUTMUT) mutmut libcst
	touch $@

# Without their dependencies, which are in the list as far as a step on a CPU needs them: torchvision, xformers and
# others come for CUDA alone.
$(INTEGRATIONS)/%/.installed: tests/integrations/%.txt $(INSTALLED)
	rm -rf $(@D)
	$(BIN)/python -m pip install --quiet --no-deps --target $(@D) -r $<
	touch $@

# The source distribution of the pinned version has PEFT's tests; what they import is put beside the environment.
$(PEFT_SUITE)/.fetched: tests/peft_suite/needs.txt constraints.txt $(INSTALLED)
	rm -rf $(PEFT_SUITE)
	mkdir -p $(PEFT_SUITE)/peft
	$(BIN)/python -m pip install --quiet setuptools wheel
	$(BIN)/python -m pip install --quiet --no-deps --target $(PEFT_SUITE)/needs -r $<
	$(BIN)/python -m pip download --quiet --no-deps --no-build-isolation --no-binary peft -c constraints.txt \
		--dest $(PEFT_SUITE) peft
	tar -xzf $(PEFT_SUITE)/peft-*.tar.gz --strip-components 1 -C $(PEFT_SUITE)/peft
	touch $@

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest runs build dist .pytest_cache .ruff_cache .hypothesis
