PYTHON ?= python3
TORCH ?= torch==2.13.0
# --system-site-packages together with TORCH=torch uses the torch that is already installed.
VENV_FLAGS ?=

# Test processes, with one thread each.
WORKERS ?= 2

# Threads that wait by spinning take the processor from those that work as soon as a machine is shared.
export OMP_WAIT_POLICY ?= passive

BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test check acceptance

demo: $(STAMP)
	$(BIN)/rome-fast demo

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --benchmark-disable

# What the README promises, on the real model; needs development data beside the repository, and says so.
acceptance: $(STAMP)
	$(BIN)/python -m pytest -s -m slow

check: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

# torch has to be there before anything that depends on it: a looser request fetches a newer build and with it
# gigabytes of CUDA packages.
$(STAMP): pyproject.toml setup.py CMakeLists.txt $(wildcard kernels/native/*.cpp kernels/native/*.h)
	$(PYTHON) -m venv $(VENV_FLAGS) .venv
	$(BIN)/python -m pip install --quiet '$(TORCH)'
	$(BIN)/python -m pip install --quiet -e '.[test,dev,kernels]'
	touch $@
