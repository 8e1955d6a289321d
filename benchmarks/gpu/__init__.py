"""The same questions on a GPU: `benchmarks/gpu.sh` builds, tests and measures; `cases.py` says what, `measure.py` how.

Inputs are made on the device, times are those of the device (events, L2 flushed between calls), and small ops are measured as a
replayed CUDA graph as well. Results: benchmarks/results/<gpu>/<case>.json; `page.py` makes docs/benchmarks-gpu.md of them.
"""
