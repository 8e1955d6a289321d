# make demo: install and run the main job.  make test: install and run every test.  Torch is pinned in one place:
TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV ?= .venv

# KDFAST_CUDA=1 puts the CUDA kernels into the core of `test`, `demo` and `core`: minutes of nvcc that only a GPU pays back. A wheel
# and plain pip take them wherever nvcc works. KDFAST_CUDA_ARCHS="90": for these GPUs alone.
KDFAST_CUDA ?= 0

BIN := $(abspath $(VENV))/bin
READY := $(VENV)/.ready
TESTS := $(VENV)/.tests
# Development targets use the active environment if there is one.
ACTIVE := $(if $(VIRTUAL_ENV),python,$(BIN)/python)
export PATH := $(if $(VIRTUAL_ENV),,$(BIN):)$(PATH)
PIP = $(BIN)/python -m pip install -q --no-compile --disable-pip-version-check "$(TORCH)"
# Prints the requirements that pyproject.toml has under the keys that follow.
REQUIRED := import functools, sys, tomllib; t = tomllib.load(open("pyproject.toml", "rb")); \
  print(*(line for key in sys.argv[1:] for line in functools.reduce(dict.get, key.split("."), t)), sep="\n")

.PHONY: demo distill-lm test test-isa test-triton triton-table cuda cuda-table sanitize lint check-install wheel bench experiments method-costs methods-page leaderboard core clean

# The environment of the main job: an editable install, and the compiled core next to the sources, built in the environment's own
# folder, so that a change of the core's sources compiles only what it touches.
$(READY): pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*.* csrc/*/*.*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c '$(REQUIRED)' build-system.requires > $(VENV)/build.txt
	$(PIP) -r $(VENV)/build.txt
	KDFAST_CORE=0 $(PIP) --no-build-isolation -e ".[train]"
	$(MAKE) --no-print-directory core VIRTUAL_ENV= DEV=$(VENV)/core
	touch $@

# What tests and linters need besides.
$(TESTS): $(READY)
	$(BIN)/python -c '$(REQUIRED)' $(addprefix project.optional-dependencies.,hf trainers test lint) > $(VENV)/tests.txt
	$(PIP) -r $(VENV)/tests.txt
	touch $@

# The main job: trains a teacher, then students with labels alone, with plain KD and with the method, over 5 seeds.
# Ends with the path of the report. DEMO: options that win, `make demo DEMO="--method kd --seeds 1"`.
demo: $(READY)
	$(BIN)/kdfast distill --data digits --method sinkd --seeds 5 --out runs/demo $(DEMO)

# The second main job: a small teacher language model, its cache and students, with the default settings; then the result that is kept,
# its figure and its table in docs/language-models.md. A stopped run goes on. LM: options that win.
distill-lm: $(if $(VIRTUAL_ENV),,$(TESTS))
	$(ACTIVE) -m kdfast.cli distill-lm --out runs/lm $(LM)
	$(ACTIVE) tools/lm_page.py runs/lm

# The whole suite, on the compiled core; as a module, so that the tests see benchmarks/. ARGS: more for pytest, `make test ARGS="-k sinkhorn"`.
test: $(TESTS)
	KDFAST_EXPECT_CORE=1 $(BIN)/python -m pytest -q $(ARGS)

# What exercises every kernel of the core, after a look at which core it is. The linear and sparse ops are torch loops around kernels
# that are tested here; the tests of modes run the same kernels under compile, export, func.
KERNEL_TESTS := $(addprefix python_tests/test_core.py::test_the_,core_is_what_this_run_expects forced_instruction_set_is_used) \
  python_tests/ops python_tests/test_library.py --ignore-glob='*linear*' \
  --ignore-glob='*sparse_divergence*' -k "not inductor and not gradcheck_of_the_reference and not modes"

# The tests of the kernels on every instruction set below the best one, which `make test` ran; never above the machine's.
test-isa: $(TESTS)
	failed=0; for isa in $$($(BIN)/python -c "import kdfast; print(*kdfast.backend_info()['cpu']['isas'][:-1])"); do \
	  echo "== KDFAST_CPU_ISA=$$isa"; \
	  KDFAST_CPU_ISA=$$isa KDFAST_EXPECT_CORE=1 HYPOTHESIS_PROFILE=dev \
	    $(BIN)/pytest -q $(KERNEL_TESTS) $(ARGS) || failed=1; \
	done; exit $$failed

# The Triton kernels without a GPU: under the interpreter, and compiled ahead of time. Two processes, since a kernel that was
# defined under the interpreter cannot be compiled (python_tests/triton_mode.py).
MODES := interpreted ahead
test-triton: $(TESTS)
	failed=0; for mode in $(MODES); do \
	  KDFAST_TRITON_TESTS=$$mode TRITON_INTERPRET=$$([ $$mode = interpreted ] && echo 1 || echo 0) \
	    $(BIN)/python -m pytest -q python_tests/triton $(ARGS) || failed=1; \
	done; exit $$failed

# What every Triton kernel uses on each GPU: benchmarks/results/triton/registers.json and docs/triton.md.
triton-table: $(if $(VIRTUAL_ENV),,$(TESTS))
	PYTHONPATH=$(CURDIR) $(ACTIVE) tools/triton_table.py $(CASES)

# The kernels' tests on a core with AddressSanitizer and UndefinedBehaviorSanitizer. -k: a compiler would inherit the preload, and
# the reference's own derivatives run no kernel. --capture=sys leaves the sanitizers their stream: a report captured by a
# process that then aborts is lost.
# The package is a folder of links to the sources beside the sanitized core, found first through PYTHONPATH.
SANITIZED := $(CURDIR)/build/sanitize/package
sanitize: $(TESTS)
	PATH="$(BIN):$$PATH" $(call CONFIGURE,build/sanitize,$(BIN)/python) -DKDFAST_SANITIZE=ON -DKDFAST_CUDA=0 > /dev/null
	$(BIN)/cmake --build build/sanitize
	rm -rf $(SANITIZED) && mkdir -p $(SANITIZED)/kdfast && ln -s $(CURDIR)/kdfast/* $(SANITIZED)/kdfast/ && rm -f $(SANITIZED)/kdfast/_C*
	cp build/sanitize/_C*.so $(SANITIZED)/kdfast/
	PYTHONPATH=$(SANITIZED) KDFAST_EXPECT_CORE=$(SANITIZED) HYPOTHESIS_PROFILE=dev \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
	  $(BIN)/pytest -q -p no:cacheprovider --capture=sys $(KERNEL_TESTS) $(ARGS)

lint: $(TESTS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Isolated, offline, archive, without a core, without a compiler: each tried for real, in build/install.
check-install: $(TESTS)
	$(BIN)/python tools/check_install.py

wheel: $(READY)
	KDFAST_CORE=1 $(BIN)/python -m pip wheel --disable-pip-version-check --no-deps -w dist .

# Measures what has no result for these sources, then docs/benchmarks.md, its plots and the README table. CASE="a b": these again.
bench: $(if $(VIRTUAL_ENV),,$(TESTS))
	$(ACTIVE) -m benchmarks.run $(CASE)

# Experiments of the papers that benchmarks/results/methods/ does not hold yet; can be stopped and goes on where it was.
experiments: $(if $(VIRTUAL_ENV),,$(READY))
	$(ACTIVE) -m benchmarks.experiments
	$(ACTIVE) tools/methods_page.py

# docs/methods.md from the catalogue, the docstrings and the results of the experiments.
methods-page: $(if $(VIRTUAL_ENV),,$(READY))
	$(ACTIVE) tools/methods_page.py

# One training step of every method beside plain KD and on the reference path; goes on where it was. METHODS="a b": these again.
method-costs: $(if $(VIRTUAL_ENV),,$(READY))
	$(ACTIVE) -m benchmarks.method_costs $(METHODS)
	$(ACTIVE) tools/methods_page.py

# Every classification method on the same teacher, student, data and seeds: docs/leaderboard.md; resumable.
leaderboard: $(if $(VIRTUAL_ENV),,$(READY))
	$(ACTIVE) -m benchmarks.leaderboard

# The compiled core, built in DEV, incremental: for development (needs pybind11, cmake and ninja) ...
DEV ?= build/dev
CONFIGURE = cmake -S . -B $(1) -G Ninja -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE=$$(command -v $(2)) \
	  -Dpybind11_DIR=$$($(2) -c 'import pybind11; print(pybind11.get_cmake_dir())') $(CMAKE_ARGS)

# ... and put next to the Python sources.
core:
	$(call CONFIGURE,$(DEV),$(ACTIVE)) -DKDFAST_CUDA=$(KDFAST_CUDA) -DKDFAST_CUDA_ARCHS="$(KDFAST_CUDA_ARCHS)" > /dev/null
	cmake --build $(DEV)
	install -m 644 $(DEV)/_C*.so kdfast/

# The CUDA kernels without a GPU: compiled for sm_90 alone into a core of its own (build/cuda, over the objects of `make core`),
# which must load without a driver, need no CUDA library, and use no more registers than benchmarks/results/cuda/registers.json.
cuda:
	$(call CONFIGURE,$(DEV),$(ACTIVE)) -DKDFAST_CUDA=1 -DKDFAST_CUDA_ARCHS=90 > /dev/null
	cmake --build $(DEV)
	mkdir -p build/cuda && cp $(DEV)/_C*.so build/cuda/
	$(ACTIVE) tools/check_core.py build/cuda/_C*.so $(DEV)
	$(ACTIVE) tools/cuda_table.py --check $(DEV) build/cuda

# After a change of a kernel: the table anew, once `make cuda` has built it.
cuda-table:
	$(ACTIVE) tools/cuda_table.py $(DEV) build/cuda

clean:
	rm -rf build dist kdfast/_C*.so $(VENV)
