"""Peak memory of linear_distillation_loss, measured: two chunks of logits and the gradients, and far below the logits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import kdfast
from kdfast.ops.linear_chunks import bfloat16_products

ROOT = Path(__file__).parents[2]
ROWS, CLASSES, WIDTH, CHUNK = 768, 40000, 32, 96

# A process of its own: the high-water mark of a long test run says nothing.
MEASURE = f"""
import gc, json, sys
import torch
from benchmarks import machine
from benchmarks.cases.linear import head, ours
from kdfast.losses import linear_distillation_loss

dtype = getattr(torch, sys.argv[1])
inputs = head({ROWS}, {CLASSES}, {WIDTH}, dtype)
leaves = [inputs["hidden"], inputs["weight"]]
if sys.argv[2] == "frozen":
    inputs["weight"].requires_grad_(False)
plain = sys.argv[3] == "plain"

def call():
    if plain:
        from benchmarks.baselines.linear import forward_kl
        return forward_kl(**inputs)
    return linear_distillation_loss(
        inputs["hidden"], inputs["weight"], inputs["teacher_hidden"], inputs["labels"], teacher_weight=inputs["teacher_weight"],
        ce_weight=0.0, kd_weight=1.0, chunk_rows={CHUNK},
    ).loss

call().backward()
for leaf in leaves:
    leaf.grad = None
gc.collect()
allowed = machine.reset_peak()
before, _ = machine.resident()
call().backward()
_, peak = machine.resident()
print(json.dumps(peak - before if allowed else None))
"""


def peak(dtype: str, head: str, form: str) -> int:
    command = [sys.executable, "-W", "ignore", "-c", MEASURE, dtype, head, form]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    measured = json.loads(run.stdout)
    if measured is None:
        pytest.skip("this system does not let a process reset its high-water mark")
    return measured


@pytest.mark.skipif(not kdfast.backend_info()["compiled"], reason="no compiled core")
@pytest.mark.parametrize("head", ["trained", "frozen"])
@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_two_chunks_and_the_gradients(dtype, size, head):
    got = peak(dtype, head, "ours")
    chunks, hidden = 2 * CHUNK * CLASSES * size, ROWS * WIDTH * size
    gradient = 4 * CLASSES * WIDTH if head == "trained" else 0  # in float32 while it is summed
    # beside them: a bfloat16 head's gradient is rounded in parts of 40 MB (here one), its products are [V, 64 features]
    extra = (3 * CLASSES * WIDTH * size if head == "trained" and dtype == "bfloat16" else 0) + (12 << 20)
    if (
        dtype == "bfloat16" and not bfloat16_products()
    ):  # the products are of float32 copies: 4 MB of head and of logits, each model
        extra += 16 << 20
    assert got <= chunks + gradient + hidden + extra
    assert got >= chunks / 2, "less than the chunks themselves: nothing was measured"
    if dtype == "float32" and head == "trained":
        assert peak(dtype, head, "plain") > 8 * got
