# The project's commands; `make help` lists them. Variables: PYTHON, VENV, NPROC, CONFIG, STEPS, OUT, TORCH_INDEX, ARGS, JOBS, PART.
PYTHON      ?= python3
VENV        ?= .venv
NPROC       ?=
CONFIG      ?=
STEPS       ?=
OUT         ?= runs/bytelm
TORCH_INDEX ?=
ARGS        ?=
JOBS        ?= 3
PART        ?=

BIN := $(VENV)/bin
RUN := PATH="$(abspath $(BIN)):$$PATH"
BUILD := build/cmake
SPEC := pyproject.toml constraints.txt setup.py
CXX_SOURCES := csrc -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu'

# Hundreds of Python processes start in a test run: let the first one keep what it has compiled.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv train test parity csrc-test csrc-test-neon csrc-test-avx512 pytest ops lint format bench wheel gpu clean

help: ## Show this list
	@echo "usage: make TARGET [VARIABLE=value ...]"
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /\1\t/' | while IFS=$$(printf '\t') read -r target text; do \
	    printf '  %-16s %s\n' "$$target" "$$text"; done
	@echo "variables:"
	@echo "  NPROC=n         ranks of make train (default: one per GPU, or 2 on the CPU)"
	@echo "  CONFIG=file     its config (default: examples/bytelm/config.json, or config_fp32.json on a CPU without bfloat16)"
	@echo "  STEPS=n         its number of updates          OUT=folder  where its results go (default: $(OUT))"
	@echo "  PYTHON=python3  the interpreter that makes the virtual environment, and that make gpu uses as it is"
	@echo "  TORCH_INDEX=url a package index that has the torch build you want, such as PyTorch's index of CPU builds"
	@echo "  PART=n          the part of make gpu           ARGS='...'  more arguments for make test, bench or train"
	@echo "  JOBS=3          processes that run the tests, each with ranks of its own (some only wait)"

# --------------------------------------------------------------------------------------------------------- environment
# Stamps: a change of what is to be installed installs again; otherwise nothing is touched.

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "make: $(PYTHON) is older than Python 3.10; choose another one: make PYTHON=python3.11 ..."; exit 1; }
	@if $(PYTHON) -c 'import torch; v = torch.__version__.split("."); raise SystemExit((int(v[0]), int(v[1])) < (2, 11))' 2>/dev/null; then \
	    echo "Creating $(VENV) beside the installed torch $$($(PYTHON) -c 'import torch; print(torch.__version__)')" && \
	    $(PYTHON) -m venv $(VENV) && $@ -m pip uninstall -qq -y setuptools && \
	    $(PYTHON) -c 'import sys; print(*(f"import site; site.addsitedir({path!r})" \
	        for path in sys.path if path.endswith(("site-packages", "dist-packages"))), sep="\n")' > $(VENV)/reused.pth && \
	    cp $(VENV)/reused.pth "$$($@ -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"; \
	else \
	    echo "Creating $(VENV)" && $(PYTHON) -m venv $(VENV); \
	fi

# The versions to install: all that were tested, or, beside a reused torch, those of what the machine does not have.
$(VENV)/constraints.txt: constraints.txt | $(BIN)/python
	@if [ -e $(VENV)/reused.pth ]; then \
	    $(PYTHON) -c 'import importlib.metadata as m; \
	        plain = lambda name: name.split("==")[0].strip().lower().replace("-", "_"); \
	        have = {plain(d.metadata["Name"]) for d in m.distributions()}; \
	        print(*(line for line in open("$<").read().splitlines() if plain(line) not in have), sep="\n")' > $@; \
	else \
	    cp $< $@; \
	fi

$(VENV)/torch.stamp: $(VENV)/constraints.txt
	@if ! $(BIN)/python -c 'import torch' 2>/dev/null; then \
	    echo "torch is not installed: pip downloads it now, about 200 MB for a CPU build, several GB for one with CUDA"; \
	    echo "libraries (the default on Linux x86_64). No GPU here? Then stop and set TORCH_INDEX to PyTorch's index of CPU"; \
	    echo "builds, which pytorch.org shows under 'Get started'."; \
	    $(BIN)/python -m pip install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c $< torch; \
	fi
	@touch $@

# $(call install,EXTRAS): deepcore in place with its extras; without the network where all is there already
define install
	@if ! $(INSTALL) --no-index --no-build-isolation -e '.[$(1)]' 2>/dev/null; then \
	    echo "Installing deepcore[$(1)]" && \
	    $(INSTALL) 'setuptools>=77' wheel && \
	    $(INSTALL) --no-build-isolation -e '.[$(1)]'; \
	fi
	@touch $@
endef
# Python compiles what it imports; most of what these packages hold is never imported.
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-compile -c $(VENV)/constraints.txt

# Each holds what the ones above it do, so that a fresh clone needs one of them only.
$(VENV)/train.stamp: $(SPEC) $(VENV)/torch.stamp
	$(call install,jit$(,)examples)

$(VENV)/test.stamp: $(SPEC) $(VENV)/torch.stamp
	$(call install,jit$(,)examples$(,)test$(,)models)
	@touch $(VENV)/train.stamp

$(VENV)/lint.stamp: $(SPEC) $(VENV)/torch.stamp
	$(call install,jit$(,)examples$(,)test$(,)models$(,)lint)
	@touch $(VENV)/train.stamp $(VENV)/test.stamp

, := ,

venv: $(VENV)/lint.stamp ## Make the virtual environment with everything that development needs
	@echo "ready: $(BIN)/python"

ops: $(VENV)/train.stamp
	@$(BIN)/deepcore ops status --build > /dev/null

# ------------------------------------------------------------------------------------------------------------- the job

train: ops ## Train a byte-level GPT on the Python standard library's source
	@nproc=$(NPROC); config=$(CONFIG); \
	[ -n "$$nproc" ] || nproc=$$($(BIN)/python -c 'import torch; print(torch.cuda.device_count() or 2)'); \
	if [ -z "$$config" ]; then \
	    config=examples/bytelm/config.json; \
	    if ! $(BIN)/python -c 'import torch; raise SystemExit(not torch.cuda.is_available())' && ! grep -qm1 bf16 /proc/cpuinfo; then \
	        echo "This CPU has no bfloat16 arithmetic: training in float32."; config=examples/bytelm/config_fp32.json; \
	    fi; \
	fi; \
	$(BIN)/deepcore run --nproc $$nproc examples/bytelm/train.py --config $$config --out $(OUT) $(if $(STEPS),--steps $(STEPS)) $(ARGS)

# ------------------------------------------------------------------------------------------------------------ checking

test: csrc-test pytest ## Build and test everything: the C++ core, the CUDA code where nvcc is found, the Python package

csrc-test: $(VENV)/test.stamp
	@if ! command -v $${CXX:-c++} > /dev/null; then \
	    echo "No C++ compiler: the tests of csrc/ are left out. Install one (for example g++) to run them."; \
	else \
	    $(RUN) cmake -S . -B $(BUILD) -G Ninja -DCMAKE_BUILD_TYPE=Release --log-level=WARNING && \
	    $(RUN) cmake --build $(BUILD) && \
	    $(RUN) ctest --test-dir $(BUILD) --output-on-failure; \
	fi

csrc-test-neon: $(VENV)/test.stamp ## Build the C++ core for 64-bit Arm and test it under qemu, on any machine
	@$(RUN) CMAKE_TOOLCHAIN_FILE=csrc/tests/aarch64.cmake cmake -S . -B $(BUILD)-neon -G Ninja --log-level=WARNING
	@$(RUN) cmake --build $(BUILD)-neon
	@$(RUN) ctest --test-dir $(BUILD)-neon --output-on-failure

csrc-test-avx512: $(VENV)/test.stamp ## Test the C++ core's AVX-512 variants on an emulated processor, on any x86-64 machine
	@$(RUN) csrc/tests/avx512_emulated.sh $(BUILD)-avx512

pytest: $(VENV)/test.stamp ops
	@$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

parity: $(VENV)/test.stamp ops ## Run the whole parity matrix, the nightly half included
	@$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "" tests/parity tests/dist $(ARGS)

lint: $(VENV)/lint.stamp ## Check style, types and the laws of the house
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	find $(CXX_SOURCES) | $(RUN) xargs clang-format --dry-run -Werror
	$(BIN)/python -m pytest -q tests/meta/test_house.py

format: $(VENV)/lint.stamp ## Rewrite the sources in the project's style
	$(BIN)/python -m ruff check --fix-only .
	$(BIN)/python -m ruff format .
	find $(CXX_SOURCES) | $(RUN) xargs clang-format -i

bench: $(VENV)/test.stamp ops ## Run the benchmarks (ARGS: subjects and options)
	@$(BIN)/python -m benchmarks $(ARGS)

# ------------------------------------------------------------------------------------------------------------ releases

wheel: $(VENV)/test.stamp ## Build a wheel with the native ops inside, into dist/
	@$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	@ls -1 dist/*.whl

gpu: ## Test and measure on a GPU with the machine's own torch; PART=n runs one part of under 9 minutes
	@PYTHONPATH=. $(PYTHON) -m benchmarks.gpu $(if $(PART),--part $(PART)) $(ARGS)

clean: ## Remove what was built (not .venv, not runs/)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
