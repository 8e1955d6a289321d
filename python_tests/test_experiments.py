"""The papers' experiments: a few steps, resuming, refusing other settings. Full runs: make experiments."""

import dataclasses
import json

import pytest
import torch

pytest.importorskip("sklearn")

from benchmarks.experiments import (
    bd_kd,
    cnn_vit_bsd,
    dhkd,
    dho,
    hyperformer,
    lsskd,
    nd_loss,
    sinkd,
    switch_dit,
    tgeo_kd,
)
from kdfast.data import load_task


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
    assert len(results["sentences"]) == 7 and len(results["shared_experts"]["whole"][0]) == 4
    assert switch_dit.run(out, seeds=1, work=tmp_path / "elsewhere") == json.loads(out.read_text())


def test_cnn_vit_bsd_runs_resumes_and_counts_who_teaches(tmp_path):
    out = tmp_path / "results" / "cnn_vit_bsd.json"
    results = cnn_vit_bsd.run(out, seeds=1, steps=3, work=tmp_path / "work")
    assert list(results["arms"]) == ["ce", "mutual", "pixel", "cnn_vit_bsd"]
    assert set(results["selected"]) == {"pixel", "cnn_vit_bsd"}
    for name, shares in results["selected"].items():
        assert shares["to_cnn"]["least"] > 0 and shares["to_vit"]["least"] > 0 <= shares["ties"]["least"], name
        assert sum(share["mean"] for share in shares.values()) == pytest.approx(1)
    for arm in results["arms"].values():
        assert arm["test"][0] == pytest.approx(sum(arm["each"][0]) / 2)
    assert len({tuple(arm["each"][0]) for arm in results["arms"].values()}) == 4  # no two arms are the same
    assert cnn_vit_bsd.run(out, seeds=1, work=tmp_path / "elsewhere") == json.loads(out.read_text())

    # Finished arms are read, a missing one is made again.
    out.unlink()
    (tmp_path / "work" / "runs" / "pixel-0.json").unlink()
    stored = tmp_path / "work" / "runs" / "ce-0.json"
    stored.write_text(json.dumps(json.loads(stored.read_text()) | {"test": 0.125}))
    again = cnn_vit_bsd.run(out, seeds=1, steps=3, work=tmp_path / "work")
    assert again["arms"]["ce"]["test"] == [0.125]
    assert again["arms"]["pixel"]["test"] == results["arms"]["pixel"]["test"]


def test_shares_of_selected_pixels_by_hand():
    shares = cnn_vit_bsd.selected([{"num_valid": [10.0, 10.0], "num_to_a": [4.0, 0.0], "num_to_b": [5.0, 10.0]}])
    assert shares["to_cnn"] == {"mean": 0.2, "least": 0.0} and shares["ties"] == {"mean": 0.05, "least": 0.0}
    assert "not every epoch" in cnn_vit_bsd.sentence("x", shares)
    shares["to_cnn"]["least"] = 0.1
    assert "in every epoch" in cnn_vit_bsd.sentence("x", shares)


def test_shared_experts_by_hand():
    paths = torch.tensor([[[0, 1]]] * 50 + [[[0, 2]]] * 50)  # one expert in common across the middle
    near, *_, far = switch_dit.shared_experts(paths)
    assert 0.9 < near < 1.0 and far == 0.5
    assert "falls" in switch_dit.sentence("x", [[0.9, 0.8, 0.7, 0.6]])
    assert "does not fall" in switch_dit.sentence("x", [[0.9, 0.8, 0.85, 0.6]])


def test_nd_loss_measures_norm_and_direction(tmp_path):
    task = dataclasses.replace(nd_loss.shifted_digits(12), teacher_steps=70)
    out = tmp_path / "results" / "nd_loss.json"
    results = nd_loss.run(out, seeds=1, steps=70, tasks=[task], work=tmp_path / "work")
    found = results["data"]["shifted_digits_12"]["arms"]
    assert list(found) == ["teacher", *(arm.name for arm in nd_loss.ARMS)]
    assert found["ce"]["measures"]["norm ratio"][0] < found["ce_nd_2"]["measures"]["norm ratio"][0]
    assert sum("chosen on the validation split" in line for line in results["sentences"]) == 2
    assert nd_loss.run(out, seeds=1, tasks=[task], work=tmp_path / "elsewhere") == json.loads(out.read_text())


def test_bd_kd_measures_calibration_of_the_student(tmp_path):
    out = tmp_path / "results" / "bd_kd.json"
    results = bd_kd.run(out, seeds=1, steps=40, work=tmp_path / "work")
    assert list(results["arms"]) == [arm.name for arm in bd_kd.ARMS] and len(results["sentences"]) == 11
    for arm in results["arms"].values():
        assert arm["test"][0] == arm["each"][0][0] and 0 < arm["measures"]["ECE"][0] < 1
    assert len({arm["measures"]["ECE"][0] for arm in results["arms"].values()}) == 6  # no two arms are the same
    assert bd_kd.run(out, seeds=1, work=tmp_path / "elsewhere") == json.loads(out.read_text())


def test_dhkd_counts_conflicts(tmp_path):
    out = tmp_path / "results" / "dhkd.json"
    tasks = [
        dataclasses.replace(dhkd.many_digits(), teacher_steps=40),
        dataclasses.replace(dhkd.digit_pairs(), teacher_steps=2),
    ]
    results = dhkd.run(out, seeds=1, steps=180, tasks=tasks[:1], work=tmp_path / "work")
    found = results["data"]["many_digits"]["arms"]
    assert list(found) == ["teacher", *(arm.name for arm in dhkd.ARMS)] and len(results["sentences"]) == 8
    assert 0 < found["dhkd"]["measures"]["share of steps with opposed gradients"][0] < 1
    assert set(found["one_head"]["measures"]) == {"training CE"} and found["ce"]["measures"]["training CE"][0] < 1
    images, labels = tasks[1].splits(0)["student"].tensors
    assert images.shape == (3000, 1, 8, 16) and labels.unique().tolist() == list(range(100))
    pairs = dhkd.run(tmp_path / "pairs.json", seeds=1, steps=2, tasks=tasks[1:], work=tmp_path / "pairs")
    assert list(pairs["data"]) == ["digit_pairs"]
    assert dhkd.run(out, seeds=1, tasks=tasks[:1], work=tmp_path / "elsewhere") == json.loads(out.read_text())


def test_dho_measures_the_conflict_of_gradients(tmp_path):
    out = tmp_path / "results" / "dho.json"
    task = dataclasses.replace(load_task("digit_few"), teacher_steps=40)
    results = dho.run(out, seeds=1, steps=40, task=task, work=tmp_path / "work")
    assert list(results["arms"]) == ["teacher", *(arm.name for arm in dho.ARMS)] and len(results["sentences"]) == 9
    measures = {name: arm["measures"] for name, arm in results["arms"].items()}
    assert set(measures["dho"]) == {"gradient cosine", "alpha", "beta"} and measures["ce"] == {}
    assert measures["dual_half"]["alpha"] == [0.5] and -1 < measures["single_head"]["gradient cosine"][0] < 1
    assert dho.run(out, seeds=1, work=tmp_path / "elsewhere") == json.loads(out.read_text())


def test_tgeo_kd_measures_where_the_teacher_is_trusted(tmp_path):
    out = tmp_path / "results" / "tgeo_kd.json"
    task = dataclasses.replace(tgeo_kd.misled_digits(), teacher_steps=100)
    results = tgeo_kd.run(out, seeds=1, steps=50, task=task, work=tmp_path / "work")
    assert list(results["arms"]) == ["teacher", *(arm.name for arm in tgeo_kd.ARMS)] and len(results["sentences"]) == 9
    measures = results["arms"]["tgeo_kd"]["measures"]
    assert (
        measures["alpha, teacher wrong"] != measures["alpha, teacher right"] and results["arms"]["ce"]["measures"] == {}
    )
    assert tgeo_kd.run(out, seeds=1, work=tmp_path / "elsewhere") == json.loads(out.read_text())


def test_noticed_by_hand():
    measures = {"alpha, teacher wrong": [0.1, 0.12, 0.11], "alpha, teacher right": [0.3, 0.31, 0.32]}
    said = tgeo_kd.noticed({"arms": {"x": {"measures": measures}}}, "x")
    assert ": lower; the difference is -0.200" in said


def test_lsskd_runs_without_a_teacher(tmp_path):
    out = tmp_path / "results" / "lsskd.json"
    tasks = [lsskd.staged_digits(200)]
    results = lsskd.run(out, seeds=1, steps=4, tasks=tasks, work=tmp_path / "work")
    found = results["data"]["digit_stages_200"]
    assert list(found["arms"]) == [arm.name for arm in lsskd.ARMS] and len(results["sentences"]) == 5
    assert found["settings"]["arms"]["ce"]["rounds"] == 4
    assert found["arms"]["ce"]["curves"][0][-1][0] == 4 * found["arms"]["lsskd"]["curves"][0][-1][0]
    assert lsskd.run(out, seeds=1, tasks=tasks, work=tmp_path / "elsewhere") == json.loads(out.read_text())
    more = dataclasses.replace(lsskd.staged_digits(1000), splits=tasks[0].splits)
    both = lsskd.run(out, seeds=1, steps=1, tasks=[more], work=tmp_path / "work")  # a size that is not there yet
    assert list(both["data"]) == ["digit_stages_1000"]


def test_a_thousand_labels_are_another_size():
    splits = lsskd.staged_digits(1000).splits(0)
    assert len(splits["student"]) == 1000 and len(splits["val"]) == 200 and len(splits["test"]) == 597
    assert set(lsskd.LABELS) == {200, 1000}
