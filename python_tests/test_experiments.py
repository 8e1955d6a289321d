"""The papers' experiments: a few steps, resuming, refusing other settings. Full runs: make experiments."""

import json

import pytest

pytest.importorskip("sklearn")

from benchmarks.experiments import sinkd


def test_sinkd_runs_resumes_and_says_what_the_numbers_say(tmp_path, monkeypatch):
    monkeypatch.setattr(sinkd, "TEACHER_STEPS", 40)
    out = tmp_path / "methods" / "sinkd.json"
    results = sinkd.run(out, seeds=2, steps=15)
    assert set(results["accuracy"]) == set(sinkd.ARMS)
    assert results["accuracy"]["labels"] != results["accuracy"]["labels + KD"]
    assert results["teacher"]["0"] > 0.5
    assert len(results["sentences"]) == 6
    for said, found in zip(results["sentences"], results["comparisons"].values()):
        assert found["verdict"] in said and found["n"] == 2

    stored = json.loads(out.read_text())
    del stored["accuracy"]["labels + KD"]["1"]
    stored["accuracy"]["labels"]["0"] = 0.125  # a kept number is read, not made again
    out.write_text(json.dumps(stored))
    again = sinkd.run(out, seeds=2, steps=15)
    assert again["accuracy"]["labels + KD"] == results["accuracy"]["labels + KD"]
    assert again["accuracy"]["labels"]["0"] == 0.125
    with pytest.raises(ValueError, match="other settings"):
        sinkd.run(out, seeds=2, steps=16)
