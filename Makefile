# Every target makes its own environment on first use: `make demo` and `make test` are all there is to type.
# ARGS goes to the command behind a target: make demo ARGS="--steps 20", make test ARGS="tests/cuda -x". JOBS processes
# share the tests; none but pytest itself with JOBS=0.

TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
EASYR1 ?=
JOBS ?= 2

BIN := $(VENV)/bin
NEWEST := $(VENV)-newest
E2E := $(VENV)-verl
VIDEOS := $(VENV)-videos
# Tests of what other packages' releases can break.
OUTWARD := tests/integrations tests/trainer tests/architectures tests/examples
UV := $(VENV)-uv/bin/uv
NEW := build/lock
COMPILE = $(UV) pip compile --quiet --upgrade --no-python-downloads --universal --python-version 3.10 \
	--generate-hashes --custom-compile-command "make lock"
SOURCES := setup.py $(shell find csrc -type f)

.DEFAULT_GOAL := help
.PHONY: help demo test test-newest test-anyway test-videos bench docs lint lock build dist verl verl-e2e vllm-e2e \
	easyr1 asan arm macos gpu-check clean FORCE

help:
	@echo "make demo         train a small vision-language model with VGPO, end with a report"
	@echo "make test         run the tests"
	@echo "make test-newest  run the tests of integrations, trainer and models with the newest packages"
	@echo "make test-videos  run the tests of videos with the video processors of transformers, which need torchvision"
	@echo "make bench        run the benchmarks, append their rows to benchmarks/results and draw them"
	@echo "make docs         regenerate docs/api.md, docs/models.md and the pictures of the benchmarks"
	@echo "make lint         run the linters and the type checker"
	@echo "make lock         renew the lock that every target installs, then lint and run all tests"
	@echo "make build        compile the extension only (VGPO_BUILD=auto|cpu|cuda|none)"
	@echo "make dist         build an sdist and a wheel into dist/, and install and check them (VGPO_BUILD as above)"
	@echo "make verl         install verl and DeepSpeed into $(VENV), so that the tests with them run"
	@echo "make verl-e2e     run verl on Ray with vLLM and VGPO on this machine, without a GPU"
	@echo "make vllm-e2e     run VGPOTrainer with vLLM's engine and server on this machine, without a GPU"
	@echo "make easyr1       run the tests of EasyR1's adapter in a checkout of it: EASYR1=PATH"
	@echo "make asan         run the tests of the C++ CPU kernels under AddressSanitizer"
	@echo "make macos        compile and link the extension for macOS on arm64, on any machine (downloads 220 MB)"
	@echo "make arm          run the operators' tests as they are on 64-bit ARM, under qemu"
	@echo "make gpu-check    build, test, sanitize and measure on an NVIDIA GPU, with the Python of the machine"
	@echo "make clean        remove everything that was built, but keep the environments"

demo: $(VENV)/.built
	$(BIN)/vgpo demo $(ARGS)

# Without a GPU the kernels of Triton run in its interpreter.
test test-newest test-anyway: export TRITON_INTERPRET ?= $(if $(wildcard /dev/nvidia0 /dev/kfd),0,1)
# The threads of one process would spin where those of the other could work.
test test-newest test-anyway: export OMP_WAIT_POLICY ?= PASSIVE
test: $(VENV)/.built
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

# Our upper bounds do not hold here: what the next release of a package breaks should show before a bound is raised. The
# torch is that of $(VENV), so that the extension in the source tree, which belongs to one torch, serves both. Hence the
# paths instead of an installation, which would compile. IF_NEWER=1 does nothing where no package is newer.
test-newest: $(VENV)/.built
	@if test -n '$(IF_NEWER)' && newer=$$($(BIN)/python scripts/newest.py newer) && test -z "$$newer"; then \
		echo "no package has a newer release than the lock"; mkdir -p $(NEWEST); : > $(NEWEST)/differences.txt; \
	else $(MAKE) --no-print-directory test-anyway; fi

test-anyway:
	$(BIN)/python -m venv --clear $(NEWEST)
	$(BIN)/python scripts/newest.py packages > $(NEWEST)/packages.txt
	$(NEWEST)/bin/python -m pip install '$(TORCH)' -r $(NEWEST)/packages.txt
	$(NEWEST)/bin/python scripts/newest.py verl > $(NEWEST)/verl.txt
	$(NEWEST)/bin/python -m pip install --no-deps -r $(NEWEST)/verl.txt
	@printf '%s\n' '$(CURDIR)' '$(CURDIR)/python' > "$$(echo $(NEWEST)/lib/python3*/site-packages)/vgpo.pth"
	$(NEWEST)/bin/python scripts/newest.py differences > $(NEWEST)/differences.txt
	@echo "locked -> newest:"; cat $(NEWEST)/differences.txt
	$(NEWEST)/bin/python -m pytest -n $(JOBS) --dist worksteal $(or $(ARGS),$(OUTWARD))

# The environment stays without torchvision, with which transformers would process images otherwise.
test-videos: $(VENV)/.built $(VIDEOS)/.installed
	PYTHONPATH=tests/verl_e2e/site:$(VIDEOS) $(BIN)/python -m pytest tests/trainer/test_trainer_videos.py $(ARGS)

# VGPO_BENCH_RECORD=0 measures and records nothing.
bench: export VGPO_BENCH_RECORD ?= 1
bench: $(VENV)/.built
	$(BIN)/python -m pytest benchmarks --benchmark-only $(ARGS)
	$(BIN)/python benchmarks/plot.py

docs: $(VENV)/.built
	$(BIN)/python scripts/api_reference.py
	$(BIN)/python scripts/models_page.py
	$(BIN)/python benchmarks/plot.py
	$(BIN)/python benchmarks/scale.py --write

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# All files are made before one replaces that of before, so that a failure leaves them.
lock: $(UV)
	mkdir -p $(NEW)
	$(COMPILE) pyproject.toml requirements/torch.in --extra train --extra test --extra dev \
		--overrides requirements/overrides.txt -o $(NEW)/lock.txt
	$(COMPILE) requirements/verl.in --no-deps --no-annotate -c $(NEW)/lock.txt -o $(NEW)/verl.txt
	$(UV) pip compile --quiet --upgrade --no-python-downloads --universal --python-version 3.11 --generate-hashes \
		--no-annotate --custom-compile-command "make lock" requirements/verl-e2e.in \
		--overrides requirements/verl-e2e-overrides.txt -o $(NEW)/verl-e2e.txt
	mv $(NEW)/lock.txt $(NEW)/verl.txt $(NEW)/verl-e2e.txt requirements/
	$(MAKE) lint verl test

build: $(VENV)/.built

dist: $(VENV)/.installed
	$(BIN)/python scripts/dist.py --torch '$(TORCH)'

verl: $(VENV)/.verl

# The installation of $(VENV) serves this environment, too: its extension belongs to the same torch.
verl-e2e: $(VENV)/.built $(E2E)/.installed
	cp -r $(VENV)/lib/python3*/site-packages/*vgpo_kernels* "$$(echo $(E2E)/lib/python3*/site-packages)"
	PYTHONPATH=tests/verl_e2e/site $(E2E)/bin/python -m pytest tests/verl_e2e $(ARGS)

vllm-e2e: $(VENV)/.built $(E2E)/.overlaid
	PYTHONPATH=$(abspath $(E2E)/overlay):$(CURDIR)/tests/verl_e2e/site:$(CURDIR)/tests/vllm_e2e/site \
		$(E2E)/bin/python -m pytest tests/vllm_e2e $(ARGS)

easyr1: $(VENV)/.built $(VENV)-easyr1/.installed
	@test -d '$(EASYR1)/verl' || { echo "EASYR1=PATH must name a checkout of EasyR1"; exit 1; }
	VGPO_EASYR1='$(EASYR1)' VGPO_EASYR1_PYTHON=$(VENV)-easyr1/bin/python \
		$(BIN)/python -m pytest tests/integrations/test_easyr1_checkout.py $(ARGS)

asan: $(VENV)/.installed
	PYTHON=$(BIN)/python bash scripts/asan.sh $(ARGS)

macos: $(VENV)/.installed
	$(BIN)/python scripts/macos.py --torch '$(TORCH)' $(ARGS)

# A Debian and a torch for ARM, which it gets at first, stay in $(VENV)-arm.
arm: $(VENV)/.installed
	$(BIN)/python scripts/arm.py --folder $(VENV)-arm $(ARGS)

gpu-check:
	$(PYTHON) scripts/gpu_check.py $(ARGS)

clean:
	rm -rf build dist *.egg-info vgpo_kernels/_C*.so $(VENV)/.built
	rm -rf .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)*' -prune -exec rm -rf {} +

# The file keeps its date while TORCH keeps its value, so that another value, and nothing else, installs again.
$(VENV)/.torch: FORCE
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "$(PYTHON) is no Python of 3.10 or later: name one, as in PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo '$(TORCH)' | cmp -s - $@ || echo '$(TORCH)' > $@

# torch goes last: where it brings a Triton of its own, as for CUDA, that takes the place of the lock's. Nothing before
# it asks for a torch, since the lock holds what its packages depend on.
$(VENV)/.installed: $(VENV)/.torch requirements/lock.txt pyproject.toml setup.py
	$(BIN)/python -m pip install --no-deps --require-hashes -r requirements/lock.txt
	$(BIN)/python -m pip install '$(TORCH)'
	$(BIN)/python -m pip install --no-deps --no-build-isolation -e .
	@touch $@

# Compiles what changed since the installation, and says what was built, which pip keeps to itself.
$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	$(BIN)/python setup.py build_ext --inplace
	@touch $@

# Without its own pins, which ask for older releases than the trainer is tested with. A package that comes as source is
# built by the lock's setuptools.
$(VENV)/.verl: $(VENV)/.installed requirements/verl.txt
	$(BIN)/python -m pip install --no-deps --no-build-isolation --require-hashes -r requirements/verl.txt
	@touch $@

# --no-deps here and below, since the lock leaves out what a CPU does not need. torch is that of $(VENV).
$(VIDEOS)/.installed: $(VENV)/.torch requirements/verl-e2e.txt
	mkdir -p $(VIDEOS)
	grep -E '^(torchvision|av)==' requirements/verl-e2e.txt | tr -d '\\' > $(VIDEOS)/requirements.txt
	$(BIN)/python -m pip install --no-deps --upgrade --target $(VIDEOS) -r $(VIDEOS)/requirements.txt
	@touch $@

$(E2E)/.installed: $(VENV)/.torch requirements/verl-e2e.txt
	$(PYTHON) -m venv $(E2E)
	$(E2E)/bin/python -m pip install '$(TORCH)'
	$(E2E)/bin/python -m pip install --no-deps --require-hashes -r requirements/verl-e2e.txt
	@touch $@

# The trainer's releases, from the lock, laid over those that verl asks for.
$(E2E)/.overlaid: $(E2E)/.installed requirements/lock.txt
	awk '/^[^ #]/ { keep = /^(huggingface-hub|tokenizers|transformers|trl)==/ } keep' requirements/lock.txt > $(E2E)/overlay.txt
	rm -rf $(E2E)/overlay
	$(E2E)/bin/python -m pip install --no-deps --require-hashes --target $(E2E)/overlay -r $(E2E)/overlay.txt
	@touch $@

# With the torch of $(VENV), to which the extension in the source tree belongs.
$(VENV)-easyr1/.installed: requirements/easyr1.txt
	$(PYTHON) -m venv --clear $(VENV)-easyr1
	$(VENV)-easyr1/bin/python -m pip install '$(TORCH)' -r requirements/easyr1.txt
	@touch $@

$(UV):
	$(PYTHON) -m venv $(VENV)-uv
	$(VENV)-uv/bin/python -m pip install uv
