"""benchmarks/large.py at a small size: one process for each candidate, rounds, errors and peaks as the page wants them."""

import pytest

from benchmarks import cases, large
from benchmarks.case import OURS, PLAIN
from benchmarks.run import rows_of


def test_a_large_case_is_measured(monkeypatch, capsys):
    monkeypatch.setenv("KDFAST_BENCH_HEAD", "128,600,16")  # of the processes; this one only knows the names
    case = cases.load()["linear_js_512x151936_h512_bf16"]
    case.peers.clear()  # of this process: what is not listed is not started
    (record,) = large.measure(case, budget=0.0)
    rows = {row["candidate"]: row for row in rows_of(record, case, "default")}
    assert set(rows) == {OURS, PLAIN} and rows[OURS]["ratio"] == 1
    for row in rows.values():
        assert row["rounds"] == large.ROUNDS[0] and row["median_ms"] > 0 and row["loss_error"] < 0.05
        assert row["mode"] == "fwd+bwd" and row.get("peak_mb", 0) >= 0


def test_a_process_that_ends_is_an_error():
    case = next(iter(cases.load().values()))
    with pytest.raises(RuntimeError, match="a candidate's process ended"), large.Worker.of(case, "nobody"):
        pass
