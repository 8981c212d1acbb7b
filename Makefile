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

SUITE := $(BIN)/python -m pytest -q --benchmark-disable
IN_PROCESSES := -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# What the tests would meet on other CPUs, as far as this one can do with fewer instructions: ATEN_CPU_CAPABILITY is for
# torch's own kernels, MKL_CBWR for BLAS, ONEDNN_MAX_CPU_ISA for 16-bit products. avx512 has none of them in hardware.
CPUS ?= plain avx2 avx512 bfloat16 threads reference
cpu-plain: export ATEN_CPU_CAPABILITY=default
cpu-plain: export MKL_CBWR=COMPATIBLE
cpu-plain: export ONEDNN_MAX_CPU_ISA=SSE41
cpu-avx2: export ATEN_CPU_CAPABILITY=avx2
cpu-avx2: export MKL_CBWR=AVX2
cpu-avx2: export ONEDNN_MAX_CPU_ISA=AVX2
cpu-avx512: export ONEDNN_MAX_CPU_ISA=AVX512_CORE
cpu-threads: export OMP_NUM_THREADS=2
cpu-reference: export ROME_FAST_KERNELS=reference
OPTIONS_plain := $(IN_PROCESSES) --native generic --bfloat16 off
OPTIONS_avx2 := $(IN_PROCESSES) --native avx2 --bfloat16 off
OPTIONS_avx512 := $(IN_PROCESSES) --bfloat16 on
OPTIONS_bfloat16 := $(IN_PROCESSES) --bfloat16 on
OPTIONS_threads :=
OPTIONS_reference := $(IN_PROCESSES)

.PHONY: demo test portability check acceptance bench gpu docs

demo: $(STAMP)
	$(BIN)/rome-fast demo

test: $(STAMP)
	OMP_NUM_THREADS=1 $(SUITE) $(IN_PROCESSES)

# Five minutes for each of CPUS; `make -k` goes on after one that fails, `make cpu-plain` is one of them.
portability: $(addprefix cpu-,$(CPUS))

cpu-%: $(STAMP)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(SUITE) $(OPTIONS_$*)

# What the README promises, on the real model; needs development data beside the repository, and says so.
acceptance: $(STAMP)
	$(BIN)/python -m pytest -s -m slow

# Small sizes on a CPU; each op is checked before it is timed.
bench: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --benchmark-only --benchmark-columns=min,median,iqr,rounds benchmarks

# What only a GPU shows, in eight minutes: correctness, speed, streaming, the command line, memory accesses. Rows go to
# benchmarks/results, or to $$OUT. GPU_ARGS=--tiny runs all of it on a CPU, in three minutes of one core, with rows in build/gpu.
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
