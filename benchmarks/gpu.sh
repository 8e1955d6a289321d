#!/usr/bin/env bash
# On a machine with a GPU, CUDA's toolkit, PyTorch (2.11 or 2.13), Triton (3.6 or 3.9), cmake, ninja, pybind11; no network needed.
#
#     benchmarks/gpu.sh                build, test, bench: within 10 minutes on one H200
#     benchmarks/gpu.sh build test     one step or several: build | test | sanitize | bench
#
# PYTHON: the interpreter (default python3). WHEELS: a folder of wheels for what it lacks (pytest, hypothesis, matplotlib, ...).
# CASES: names for bench (default: every case this GPU has no result for; python -m benchmarks.gpu --list). LIMIT: seconds after
# which bench begins no further case (default 300). Run again for the rest: results are kept in benchmarks/results/<gpu>/.
# KDFAST_COMMIT: the commit, where there is no git.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
steps=("$@")
[[ ${#steps[@]} -gt 0 ]] || steps=(build test bench)
site=$PWD/build/gpu/site
export PYTHONPATH="$PWD:$site${PYTHONPATH:+:$PYTHONPATH}"
failed=0

say() { printf '=== %s (%d s)\n' "$1" "$SECONDS"; }

# The core with CUDA kernels for this GPU's architecture alone, next to the sources. cmake itself: no pip, no build isolation.
build() {
  mkdir -p "$site"
  if [[ -n "${WHEELS:-}" ]]; then
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$site" "$WHEELS"/*.whl
  fi
  local arch
  arch=$("$PYTHON" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
  cmake -S . -B build/gpu/core -G Ninja -DCMAKE_BUILD_TYPE=Release -DKDFAST_CUDA=1 -DKDFAST_CUDA_ARCHS="$arch" \
    -DPython_EXECUTABLE="$(command -v "$PYTHON")" -Dpybind11_DIR="$("$PYTHON" -c 'import pybind11; print(pybind11.get_cmake_dir())')"
  cmake --build build/gpu/core
  rm -f kdfast/_C*.so
  cp build/gpu/core/_C*.so kdfast/
  "$PYTHON" -c 'import json, kdfast; print(json.dumps(kdfast.backend_info(), indent=1, default=str))'
}

# Every op on the GPU, by every backend, in four dtypes; then CPU op tests on this machine's Python and torch. In several
# processes where xdist is there: hundreds of kernels are compiled, each on one core. An older torch warns of cuBLAS without a
# workspace setting, and warnings are errors in the tests.
pytests() {
  local limit=$1 parallel=()
  shift
  "$PYTHON" -c 'import xdist' 2> /dev/null && parallel=(-p xdist.plugin -n "${JOBS:-12}")
  PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 CUBLAS_WORKSPACE_CONFIG=${CUBLAS_WORKSPACE_CONFIG:-:4096:8} OMP_NUM_THREADS=2 KDFAST_EXPECT_CORE=1 \
    timeout "$limit" "$PYTHON" -m pytest -q -p no:cacheprovider "${parallel[@]}" "$@" || failed=1
}
tests() {
  KDFAST_EXPECT_GPU=1 pytests 300 python_tests/gpu python_tests/triton/test_on_a_gpu.py
  HYPOTHESIS_PROFILE=dev pytests 90 python_tests/ops/test_divergence.py python_tests/ops/test_selective.py -k "not inductor"
}

# Memory errors and races of the CUDA kernels, where compute-sanitizer is installed.
sanitize() {
  if ! command -v compute-sanitizer > /dev/null; then
    echo "compute-sanitizer is not installed: skipped"
    return
  fi
  local tool
  for tool in memcheck racecheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 --kernel-regex kns=kdfast \
      "$PYTHON" -m pytest -q -x -p no:cacheprovider python_tests/gpu -k "cuda and small" || failed=1
  done
}

bench() { "$PYTHON" -m benchmarks.gpu --stop-after "${LIMIT:-300}" ${CASES:-} || failed=1; }

for step in "${steps[@]}"; do
  say "$step"
  case $step in
    build) build ;;
    test) tests ;;
    sanitize) sanitize ;;
    bench) bench ;;
    *) echo "step: expected build, test, sanitize or bench, got '$step'" >&2; exit 2 ;;
  esac
done
say "done"
exit $failed
