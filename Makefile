# make demo: install and run the main job.  make test: install and run every check.  Torch is pinned in one place:
TORCH ?= torch==2.13.0
PYTHON ?= python3

.PHONY: core
# The compiled core next to the Python sources, incremental: for development (uses the active environment).
core:
	cmake -S . -B build/dev -G Ninja -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE=$$(command -v python) \
	  -Dpybind11_DIR=$$(python -c 'import pybind11; print(pybind11.get_cmake_dir())') $(CMAKE_ARGS) > /dev/null
	cmake --build build/dev
	cp build/dev/_C*.so kdfast/

.PHONY: bench
# Measures what has no result for these sources, then docs/benchmarks.md, its plots and the README table. CASE="a b": these again.
bench:
	python -m benchmarks.run $(CASE)
