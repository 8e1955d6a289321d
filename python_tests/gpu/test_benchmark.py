"""benchmarks.gpu, on the CPU and small: every case runs, ours and the plain form compute the same, targets are judged."""

from __future__ import annotations

import dataclasses
import json
from functools import partial

import pytest
import torch

from benchmarks.gpu import cases, measure, page
from benchmarks.gpu.cases import CASES, CUDA, PLAIN, TRITON, Target

SMALL = {
    "forward_kl_8192x128256_bf16": partial(cases.logits, 4, 300, torch.bfloat16),
    "reverse_kl_8192x128256_bf16": partial(cases.logits, 4, 300, torch.bfloat16),
    "js_8192x128256_bf16": partial(cases.logits, 4, 300, torch.bfloat16),
    "forward_kl_65536x1000_bf16": partial(cases.logits, 4, 100, torch.bfloat16),
    "forward_kl_16384x100_bf16": partial(cases.logits, 4, 100, torch.bfloat16),
    "selective_kd_8x19x512x1024_fp32": partial(cases.maps, 1, 19, 8, 16),
    "sinkhorn_kd_64x1000_fp32": partial(cases.batch, 8, 50),
    "sinkhorn_cost_4096x64x64_fp32": lambda source: cases.costs(6, 8, 8, source=source),
    "sinkhorn_cost_2048x2048_fp32": lambda source: cases.costs(40, 40, source=source),
    "sinkhorn_points_8192x64_fp32": partial(cases.points, 40, 5),
    "token_graph_8192x768_k16_fp32": partial(cases.tokens, 96, 16),
    "token_contrast_8192x768_fp32": partial(cases.tokens, 64, 16),
    "route_8192x256_k8_fp32": partial(cases.router, 32, 64, 8),
    "combine_4096x7168_k8_bf16": partial(cases.expert_rows, 16, 64, 8, 32),
    "linear_forward_kl_8192x4096x128256_bf16": partial(cases.heads, 16, 32, 400),
    "linear_js_8192x4096x128256_bf16": partial(cases.heads, 16, 32, 400),
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case_runs_and_both_forms_agree(case, monkeypatch):
    monkeypatch.setattr(measure, "copy_bandwidth", lambda clock: 1e10)
    monkeypatch.setattr(
        measure.Clock, "rounds", lambda self, calls, seconds: {n: [self.round({n: c})[n]] * 3 for n, c in calls.items()}
    )
    small = dataclasses.replace(case, inputs=SMALL[case.name])
    result = measure.measure(small, torch.device("cpu"), 0.0)
    found = {(row["candidate"], row["mode"]) for row in result["rows"]}
    assert found == {(name, mode) for name in ("kdfast", PLAIN) for mode in measure.MODES}, result["left_out"]
    assert all(row["median_ms"] > 0 for row in result["rows"]) and len(result["targets"]) == len(case.targets)
    assert json.loads(json.dumps(result)) == result


def test_a_form_that_computes_something_else_is_refused():
    wrong = dataclasses.replace(
        CASES[0], inputs=SMALL[CASES[0].name], plain=lambda student, teacher: 2 * student.float().var()
    )
    with pytest.raises(AssertionError, match="eager is no peer of forward_kl"):
        measure.Bench(wrong, torch.device("cpu"))


def rows(**ms):
    names = {"triton": TRITON, "cuda": CUDA, "eager": PLAIN}
    return [
        {"candidate": names[n], "mode": "fwd+bwd", "median_ms": v, "of_copy": 1 / v, "peak_mb": 10 * v}
        for n, v in ms.items()
    ]


@pytest.mark.parametrize(
    ("target", "measured", "met"),
    [
        (Target("ms", 2.0), 1.0, True),
        (Target("ms", 1.5, of=TRITON), 2.0, False),
        (Target("x", 6), 6.0, True),
        (Target("x", 7), 6.0, False),
        (Target("x", 2, "Liger"), None, False),
        (Target("copy", 0.9), 1.0, True),
        (Target("memory", 6), 6.0, True),
        (Target("mb", 9.0), 10.0, False),
        (Target("ms", 2.0, mode="graph"), None, False),
    ],
)  # fmt: skip
def test_targets_are_judged_by_the_faster_of_ours(target, measured, met):
    assert measure.judge(target, rows(triton=2.0, cuda=1.0, eager=6.0)) == {"measured": measured, "met": met}


def test_the_page_says_that_nothing_was_measured_or_what(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "RESULTS", tmp_path)
    monkeypatch.setattr(page, "IMAGES", tmp_path)
    assert "No GPU has been measured yet" in page.text() and "<= 2.9 ms" in page.text()
    targets = [vars(t) | measure.judge(t, rows(triton=2.0, eager=6.0)) for t in CASES[0].targets]
    spread = {"p20_ms": 1.9, "p80_ms": 2.1}
    result = {"case": CASES[0].name, "title": "forward kl", "shape": "8192x128256", "dtype": "bf16", "device": "Some GPU", "torch": "2",
              "cuda": "13", "triton": "3", "kdfast": "0", "commit": "abc", "copy_gb_s": 4000.0, "left_out": {"peer": "ImportError: none"},
              "targets": targets, "rows": [row | spread for row in rows(triton=2.0, eager=1.0)]}  # fmt: skip
    (tmp_path / "some-gpu").mkdir()
    (tmp_path / "some-gpu" / f"{CASES[0].name}.json").write_text(json.dumps(result))
    text = page.text()
    assert "## Some GPU" in text and "2, met" in text and "(we lose)" in text and "Left out: peer" in text
    assert (tmp_path / "gpu-some-gpu.png").exists() and "No GPU has been measured" not in text
