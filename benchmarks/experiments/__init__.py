"""What each paper claims, at a size that two cores finish: one module per method, `run(out, ...)` and resumable.

make experiments                          everything that benchmarks/results/methods/<slug>.json does not hold yet
python -m benchmarks.experiments sinkd    one paper
"""
