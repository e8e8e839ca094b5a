# Two commands do everything on a fresh machine: `make demo` and `make test`.
# EXTRAS=cuda12 or EXTRAS=cuda13 adds GPU packages and takes torch's own build instead of the pinned CPU one.
PYTHON ?= python3
VENV ?= .venv
EXTRAS ?=
BIN := $(VENV)/bin
comma := ,
empty :=
space := $(empty) $(empty)
CONSTRAINTS := $(if $(findstring cuda,$(EXTRAS)),,-c constraints.txt)
GROUPS := test,dev$(if $(EXTRAS),$(comma)$(EXTRAS))
# One stamp for each set of extras: a changed setup.cfg or another EXTRAS installs again.
STAMP := $(VENV)/installed$(if $(EXTRAS),-$(EXTRAS))
STAMP_TEST_CUDA := $(STAMP)-test-cuda
STAMP_DOCS := $(STAMP)-docs
OUT ?= runs/demo
# Number of test processes; each computes with one thread unless a test asks for more.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.PHONY: help setup demo test test-all test-cuda test-cuda-all test-gpu lint format tree types docs bench clean

help:
	@echo "make demo      train a small CCNet on synthetic street scenes (a few minutes on 2 cores) -> $(OUT)"
	@echo "make test      the tests (under 10 minutes on 2 cores)"
	@echo "make test-all  the tests and the slow sweeps"
	@echo "make test-cuda compiles the CUDA kernels with NVRTC, CuPy and Numba, without a GPU; make test-cuda-all: all of them"
	@echo "make test-gpu  what needs a CUDA device; without a network where PYTHON has the packages"
	@echo "make lint      ruff and mypy"
	@echo "make docs      the documentation as a site -> build/site/index.html"
	@echo "make bench     the op beside its peers: 17 minutes on 2 CPU cores, up to an hour on a GPU"

setup: $(STAMP)

$(STAMP): setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) -e ".[$(GROUPS)]"
	touch $@

demo: $(STAMP)
	$(BIN)/ccgpu train cityscapes --preset demo --out $(OUT) --resume

test: $(STAMP)
	$(PYTEST) -m "not slow and not nvrtc"

test-all: $(STAMP)
	$(PYTEST) -m "not nvrtc"

$(STAMP_TEST_CUDA): $(STAMP)
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) -e ".[test-cuda]"
	touch $@

test-cuda: $(STAMP_TEST_CUDA)
	$(BIN)/python -c "from benchmarks import nvrtc; print('NVRTC', nvrtc.version())"
	$(BIN)/python -m pytest -m "nvrtc and not slow" tests/nvrtc tests/ptx tests/benchmarks/first_gpu_run

test-cuda-all: $(STAMP_TEST_CUDA)
	$(BIN)/python -c "from benchmarks import nvrtc; print('NVRTC', nvrtc.version())"
	$(BIN)/python -m pytest -m nvrtc tests/nvrtc tests/ptx tests/benchmarks/first_gpu_run

# A machine with a GPU may have no network: where PYTHON has what the tests import, nothing is installed. A wait for the
# device cannot be interrupted, so a test that hangs ends the process, from another thread.
NEEDED := torch numpy numba PIL safetensors filelock tqdm tensorboard hypothesis pytest pytest_timeout
test-gpu:
	@test -e $(STAMP) || $(PYTHON) -c "import $(subst $(space),$(comma) ,$(NEEDED))" 2>/dev/null || $(MAKE) setup
	@run=$$(test -e $(STAMP) && echo $(BIN)/python || echo $(PYTHON)) && set -x && $$run -m pytest -m gpu --timeout-method=thread tests/gpu

lint: $(STAMP) types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# mypy and the site's API pages cannot follow the mapping of the folders to subpackages, so they get the tree as a wheel
# lays it out.
tree:
	rm -rf build/tree && mkdir -p build/tree/ccgpu
	for f in ccgpu/*; do ln -s "$(CURDIR)/$$f" build/tree/ccgpu/; done
	for d in kernels models train; do ln -s "$(CURDIR)/$$d" build/tree/ccgpu/$$d; done

# Without a cache: one made before the links were renewed misses submodules.
types: $(STAMP) tree
	cd build/tree && ../../$(BIN)/python -m mypy --config-file ../../setup.cfg --cache-dir /dev/null -p ccgpu

# Alone in an environment the site's packages are few and small: no torch.
$(STAMP_DOCS): docs/requirements.txt constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) -r docs/requirements.txt
	touch $@

docs: $(STAMP_DOCS) tree
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "the documentation: build/site/index.html"

bench: $(STAMP)
	$(BIN)/python -m benchmarks.cca --suite --record

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
