PYTHON ?= python3
TORCH ?= torch==2.13.0
# --system-site-packages together with TORCH=torch uses the torch that is already installed.
VENV_FLAGS ?=

# Test processes, with one thread each. Files go to them in their order: otherwise those with few long tests come last,
# where one process waits for the other.
WORKERS ?= 2

# Threads that wait by spinning take the processor from those that work as soon as a machine is shared.
export OMP_WAIT_POLICY ?= passive

BIN := .venv/bin
STAMP := .venv/.installed

# With NOVENV=1, `make gpu` runs on PYTHON as it is and installs nothing: that Python needs torch, transformers, triton and
# pytest, and imports the package from here. GPU_ARGS is for one part, as in GPU_ARGS='--part ops --sizes 4096'.
NOVENV ?=
GPU_ARGS ?=

.PHONY: demo test check acceptance bench gpu docs

demo: $(STAMP)
	$(BIN)/rome-fast demo

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder --benchmark-disable

# What the README promises, on the real model; needs development data beside the repository, and says so.
acceptance: $(STAMP)
	$(BIN)/python -m pytest -s -m slow

# Small sizes on a CPU; each op is checked before it is timed.
bench: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --benchmark-only --benchmark-columns=min,median,iqr,rounds benchmarks

# What only a GPU shows, in nine minutes: correctness, speed, memory accesses. Rows go to benchmarks/results, or to $$OUT.
gpu: $(if $(NOVENV),,$(STAMP))
	$(if $(NOVENV),$(PYTHON),$(BIN)/python) benchmarks/gpu.py $(GPU_ARGS)

check: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

# The site, from docs/ and the docstrings, into build/site; a broken link ends it.
docs: $(STAMP)
	$(BIN)/python -m pip install --quiet -e '.[docs]'
	$(BIN)/python -m mkdocs build

# torch has to be there before anything that depends on it: a looser request fetches a newer build and with it
# gigabytes of CUDA packages.
$(STAMP): pyproject.toml setup.py CMakeLists.txt $(wildcard kernels/native/*.cpp kernels/native/*.h)
	$(PYTHON) -m venv $(VENV_FLAGS) .venv
	$(BIN)/python -m pip install --quiet '$(TORCH)'
	$(BIN)/python -m pip install --quiet -e '.[test,dev,kernels]'
	touch $@
