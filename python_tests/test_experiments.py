"""The papers' experiments: a few steps, resuming, refusing other settings. Full runs: make experiments."""

import json

import pytest
import torch

pytest.importorskip("sklearn")

from benchmarks.experiments import hyperformer, sinkd, switch_dit


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


def test_hyperformer_runs_and_resumes(tmp_path):
    out = tmp_path / "results" / "hyperformer.json"
    results = hyperformer.run(out, seeds=1, steps=2, work=tmp_path / "work")
    assert set(results["arms"]) == {"triples", "qualifiers", "dense", "whole"} and len(results["sentences"]) == 3
    assert hyperformer.run(out, seeds=1, work=tmp_path / "elsewhere") == json.loads(out.read_text())


def test_switch_dit_measures_shared_experts(tmp_path):
    out = tmp_path / "results" / "switch_dit.json"
    results = switch_dit.run(out, seeds=1, steps=2, work=tmp_path / "work")
    assert results["parameters"]["dit"] < results["parameters"]["whole"] == results["parameters"]["no_prior"]
    assert len(results["sentences"]) == 5 and len(results["shared_experts"]["whole"][0]) == 4
    assert switch_dit.run(out, seeds=1, work=tmp_path / "elsewhere") == json.loads(out.read_text())


def test_shared_experts_by_hand():
    paths = torch.tensor([[[0, 1]]] * 50 + [[[0, 2]]] * 50)  # one expert in common across the middle
    near, *_, far = switch_dit.shared_experts(paths)
    assert 0.9 < near < 1.0 and far == 0.5
    assert "falls" in switch_dit.sentence("x", [[0.9, 0.8, 0.7, 0.6]])
    assert "does not fall" in switch_dit.sentence("x", [[0.9, 0.8, 0.85, 0.6]])
