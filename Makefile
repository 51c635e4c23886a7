# Everything runs from .venv, which each target creates on first use: Python >= 3.10, a C++ compiler and make suffice.
PYTHON ?= python3
DEFTX_BUILD ?= auto
# Arguments for the program that a target runs: make test ARGS="-k svd", make bench ARGS=--quick
ARGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip -q
TORCH := 2.13.0
TORCH_INDEX := https://download.pytorch.org/whl/cpu
BUILT := .venv/built-$(DEFTX_BUILD)
NATIVE := $(shell find csrc -type f 2>/dev/null) CMakeLists.txt setup.py pyproject.toml
CUDA_ON_CPU_DIR := $(or $(CUDA_ON_CPU),../shared/tools)
# One process per core, each with one thread: on a busy two-core machine, threads that wait for each other took 16 times
# as long. The tests of a file stay in one process: they share fixtures.
PYTEST := $(BIN)/python -m pytest -q -p no:benchmark --timeout=300
PARALLEL := OMP_NUM_THREADS=1 $(PYTEST) -n logical --maxprocesses=4 --dist=loadfile --no-loadscope-reorder
# As users run it: one process with torch's default number of threads (passive waiting, for busy machines).
THREADED := env -u OMP_NUM_THREADS -u MKL_NUM_THREADS OMP_WAIT_POLICY=passive $(PYTEST)

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Without bytecode files, each process compiles torch and transformers again: 13 s of 21.
unexport PYTHONDONTWRITEBYTECODE
export DEFTX_BUILD
.DELETE_ON_ERROR:
.PHONY: help install demo test test-cuda lint format aot gpu bench wheel clean

help:  ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(BUILT)  ## .venv with pinned dependencies, and the package built into it (editable)

demo: $(BUILT)  ## the whole pipeline on real weights and real text, five minutes: runs/demo/report.md
	$(BIN)/deftx run demo $(ARGS)

# Both passes run even if the first one fails. 5 is pytest's exit status if ARGS selects no test of a pass.
test: $(BUILT)  ## the test suite: one thread per process, then the operators with torch's default number of threads
	@$(PARALLEL) --threads=one --durations=10 $(ARGS); one=$$?; \
	$(THREADED) --threads=default --durations=10 $(ARGS); several=$$?; \
	case $$one/$$several in 0/0|0/5|5/0) ;; *) echo "make test: pytest's exit status: $$one, $$several"; exit 1 ;; esac

test-cuda: $(BUILT)  ## the part of it that executes GPU kernels on the CPU (needs nvcc and CUDA_ON_CPU=dir or ../shared/tools)
	@if [ -e "$(CUDA_ON_CPU_DIR)/cudart_shim.cpp" ] || [ -e "$(CUDA_ON_CPU_DIR)/cuda_on_cpu/cudart_shim.cpp" ]; then \
		$(PARALLEL) -m cuda_on_cpu $(ARGS); \
	else \
		echo "test-cuda skipped: cuda_on_cpu is neither at CUDA_ON_CPU=dir nor at ../shared/tools"; \
	fi

lint: $(BUILT)  ## ruff (rules and format), clang-format, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $$(find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
	$(BIN)/mypy

format: $(BUILT)  ## format the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

aot: $(BUILT)  ## compile every GPU kernel for sm_80, sm_90 and sm_100; count spills and instructions
	$(BIN)/python tests/aot.py $(ARGS)

gpu:  ## build, check and measure on a GPU machine, offline, with PYTHON's own torch; ARGS: check, measure, cpu
	$(PYTHON) tests/run_gpu.py $(ARGS)

bench: $(BUILT) .venv/peers  ## time every operator and its baselines; rows go to bench/results/
	$(BIN)/python -m bench $(ARGS)

wheel: $(BUILT)  ## dist/*.whl, for every Python >= 3.10 and torch >= 2.10 of this platform
	$(PIP) wheel --no-build-isolation --no-deps -w dist .
	@ls dist/*.whl

clean:  ## remove .venv and everything built (runs/ and bench/results/ stay)
	rm -rf .venv build dist *.egg-info deftx_kernels/_build_info.json deftx_kernels/libdeftx_*
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -prune -exec rm -rf {} +

# The folder's own file, not the folder: a folder's time changes with its contents.
.venv/made:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or \
		sys.exit(f"Python >= 3.10 is needed, {sys.executable} is {sys.version}: make PYTHON=...")'
	$(PYTHON) -m venv --clear .venv
	@touch $@

# The CPU build of torch: a small download, and cuda_on_cpu needs it. PyTorch's own index serves it where no other does.
.venv/torch-$(TORCH): .venv/made
	$(PIP) install --no-compile --no-deps "torch==$(TORCH)+cpu" || \
		$(PIP) install --no-compile --no-deps "torch==$(TORCH)" --index-url $(TORCH_INDEX)
	@touch $@

.venv/packages: .venv/torch-$(TORCH) tests/requirements.txt
	$(PIP) install --no-compile --no-deps -r tests/requirements.txt
	@touch $@

.venv/peers: .venv/packages bench/requirements.txt
	@for peer in $$(grep -v '^#' bench/requirements.txt); do \
		$(PIP) install --no-compile --no-deps $$peer || echo "$$peer cannot be installed: it will be absent"; \
	done
	@touch $@

$(BUILT): .venv/packages $(NATIVE)
	@rm -f .venv/built-*
	$(PIP) install --no-build-isolation --no-deps -e .
	@touch $@
