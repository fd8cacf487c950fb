# Every target makes its own environment on first use: `make demo` and `make test` are all there is to type.
# ARGS goes to the command behind a target: make demo ARGS="--steps 20", make test ARGS="tests/emulation -x".

TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
SOURCES := setup.py $(shell find csrc -type f)

.DEFAULT_GOAL := help
.PHONY: help demo test bench docs lint build verl asan gpu-check clean FORCE

help:
	@echo "make demo       train a small vision-language model with VGPO, end with a report"
	@echo "make test       run the tests"
	@echo "make bench      run the benchmarks, append their rows to benchmarks/results and draw them"
	@echo "make docs       write what is made of docstrings and of recorded rows: docs/api.md, pictures"
	@echo "make lint       run the linters and the type checker"
	@echo "make build      compile the extension only (VGPO_BUILD=auto|cpu|cuda|none)"
	@echo "make verl       install verl beside it, so that the tests of its adapter run"
	@echo "make asan       run the tests of the C++ CPU kernels under AddressSanitizer"
	@echo "make gpu-check  build, test, sanitize and measure on an NVIDIA GPU, with the Python of the machine"
	@echo "make clean      remove everything that was built, but not $(VENV)"

demo: $(VENV)/.built
	$(BIN)/vgpo demo $(ARGS)

# Without a GPU the kernels of Triton run in its interpreter.
test: export TRITON_INTERPRET ?= $(if $(wildcard /dev/nvidia0 /dev/kfd),0,1)
test: $(VENV)/.built
	$(BIN)/python -m pytest $(ARGS)

# VGPO_BENCH_RECORD=0 measures and records nothing.
bench: export VGPO_BENCH_RECORD ?= 1
bench: $(VENV)/.built
	$(BIN)/python -m pytest benchmarks --benchmark-only $(ARGS)
	$(BIN)/python benchmarks/plot.py

docs: $(VENV)/.installed
	$(BIN)/python scripts/api_reference.py
	$(BIN)/python benchmarks/plot.py

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

build: $(VENV)/.built

verl: $(VENV)/.verl

asan: $(VENV)/.installed
	PYTHON=$(BIN)/python bash scripts/asan.sh $(ARGS)

gpu-check:
	PYTHON=$(PYTHON) bash scripts/gpu_check.sh $(ARGS)

clean:
	rm -rf build dist *.egg-info vgpo_kernels/_C*.so $(VENV)/.built
	rm -rf .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# The file keeps its date while TORCH keeps its value, so that another value, and nothing else, installs again.
$(VENV)/.torch: FORCE
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo '$(TORCH)' | cmp -s - $@ || echo '$(TORCH)' > $@

# torch goes first: the packages after it would otherwise bring a torch of their own choice.
$(VENV)/.installed: $(VENV)/.torch pyproject.toml setup.py
	$(BIN)/python -m pip install '$(TORCH)' numpy
	$(BIN)/python -m pip install -e '.[train,test,dev]'
	@touch $@

# Compiles what changed since the installation, and says what was built, which pip keeps to itself.
$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	$(BIN)/python setup.py build_ext --inplace
	@touch $@

# Without its own pins, which ask for older releases than the trainer is tested with.
$(VENV)/.verl: $(VENV)/.installed tests/integrations/verl.txt
	$(BIN)/python -m pip install --no-deps -r tests/integrations/verl.txt
	@touch $@
