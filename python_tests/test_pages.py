"""The generated pages: docs/methods.md has every method, a result becomes a table, the leaderboard says what its numbers say."""

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("sklearn")

from benchmarks import leaderboard, method_costs
from kdfast.catalogue import BASELINES, CATALOGUE, find
from kdfast.metrics.comparison import compare, summary

ROOT = Path(__file__).parents[1]
ROWS = (*BASELINES, *CATALOGUE)


@pytest.fixture(scope="module")
def page():
    spec = importlib.util.spec_from_file_location("methods_page", ROOT / "tools" / "methods_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_method_has_its_row_and_a_ready_one_its_section(page):
    text = page.page()
    for row in ROWS:
        assert f"| {row.title} | {row.status} |" in text
        assert (f"\n## {row.slug}\n" in text) == (row.status == "ready")
    committed = (ROOT / "docs" / "methods.md").read_text()
    assert all(row.title in committed for row in ROWS), "make methods-page"


def arm(scores, **more):
    return {"test": scores, **summary(scores), "ms_per_step": 1.5, "seconds": [2.0] * len(scores), **more}


def test_a_result_becomes_a_table_and_its_sentences(page, tmp_path):
    found = {
        "settings": {"data": "digits"}, "task": "digits of a test", "score": "accuracy", "commit": "abcdef0123456789, bcdefa0123456789",
        "arms": {"ce": arm([0.5, 0.7], measures={}), "x": arm([0.8, 0.8], measures={"ECE": [0.25, 0.75]})},
        "versions": {"torch": "9.9"}, "machine": {"threads": 1, "peak_rss_mb": 123.4}, "sentences": ["x wins: gain."],
    }  # fmt: skip
    (tmp_path / "kd.json").write_text(json.dumps(found))
    text = "\n".join(page.section(find("kd"), tmp_path / "kd.json"))
    for expected in (
        "| ce | 60.0 ± 10.0 | 2 | 1.50 | 2.0 | - |", "| x | 80.0 ± 0.0 | 2 | 1.50 | 2.0 | 0.500 ± 0.250 |", "- x wins: gain.",
        "commit abcdef012345, bcdefa012345;", "123 MB", "kdfast distill --data digits --method kd",
    ):  # fmt: skip
        assert expected in text, text
    two = {"data": {"one": found, "two": found}, "sentences": ["both"]}
    (tmp_path / "kd.json").write_text(json.dumps(two))
    text = "\n".join(page.section(find("kd"), tmp_path / "kd.json"))
    assert text.count("| ce | 60.0") == 2 and "On two, digits of a test:" in text
    own = {"summary": {"labels": summary([0.5, 0.7])}, "sentences": [], "versions": {"torch": "9.9", "commit": "123"}}
    (tmp_path / "kd.json").write_text(json.dumps(own))
    assert "| labels | 60.0 ± 10.0 | 2 |" in "\n".join(page.section(find("kd"), tmp_path / "kd.json"))
    assert "No figures yet" in "\n".join(page.section(find("kd"), tmp_path / "absent.json"))


# ---------------------------------------------------------------- what a step costs
def test_costs_of_a_method_are_measured_kept_and_shown(page, tmp_path, monkeypatch):
    monkeypatch.setenv("KDFAST_BACKEND", "cpu")
    out = tmp_path / "costs.json"
    monkeypatch.setattr(method_costs, "apart", lambda slug, seconds: method_costs.measure(slug, seconds=seconds))
    method_costs.main(["dkd", "--seconds", "0", "--out", str(out)])
    found = json.loads(out.read_text())["dkd"]
    assert (found["arm"], found["beside"], found["rounds"]) == ("dkd", "kd", 3)
    assert set(found["ms"]) == set(found["peak_mb"]) == set(method_costs.FORMS) and min(found["ms"].values()) > 0
    assert found["peak_mb"]["method"] >= 2 * 4 * 64 * 256 / 2**20  # two layers of the teacher, at least
    assert os.environ["KDFAST_BACKEND"] == "cpu"  # as it was

    monkeypatch.setattr(method_costs, "READY", ("dkd", "kd"))
    monkeypatch.setattr(method_costs, "apart", lambda slug, seconds: found | {"arm": slug, "reference / method": 0.5})
    method_costs.main(["--out", str(out)])  # goes on with what is not there
    both = json.loads(out.read_text())
    assert both["dkd"] == found and both["kd"]["reference / method"] == 0.5
    table = "\n".join(page.costs(both))
    assert "| kd | digits | kd |" in table and table.count("| **0.50x** |") == 1 and "commit" in table

    def broken(slug, seconds):
        raise RuntimeError(f"{slug}: no")

    monkeypatch.setattr(method_costs, "apart", broken)
    with pytest.raises(SystemExit, match="kd: no"):
        method_costs.main(["kd", "--out", str(out)])
    assert json.loads(out.read_text()) == both


def test_peak_is_what_was_held_at_once():
    def step():
        torch.ones(1 << 18).add_(1)  # freed before the next
        held = torch.ones(1 << 18), torch.ones(1 << 17)
        assert len(held) == 2

    step()
    assert method_costs.peak_bytes(step) == 4 * ((1 << 18) + (1 << 17))


def test_every_method_has_a_form_to_stand_beside():
    for slug in method_costs.READY:
        task, arm, beside = method_costs.pair(slug)
        assert arm.method is not None and arm != beside
        plain = (
            "ce" if slug in ("kd", "mutual") else method_costs.ARMS.get(slug, ("", "mutual" if task.peers else "kd"))[1]
        )
        assert beside.name == plain, slug


# ---------------------------------------------------------------- leaderboard
def test_every_ready_method_runs_or_says_why_not():
    arms, left_out = leaderboard.entries(leaderboard.board_task())
    ready = {row.slug for row in ROWS if row.status == "ready"}
    assert set(arms) - {"ce"} | set(left_out) == ready and not set(arms) & set(left_out)
    assert {"kd", "dkd", "sinkd", "trg", "nd_loss", "dhkd", "bd_kd", "tgeo_kd", "lsskd"} <= set(arms)
    assert all(len(reason) > 10 for reason in left_out.values())


def test_it_runs_resumes_on_the_same_teachers_and_writes_its_pages(tmp_path, monkeypatch):
    some = leaderboard.entries(leaderboard.board_task())[0]
    kept = {slug: some[slug] for slug in ("ce", "kd", "bd_kd")}
    monkeypatch.setattr(leaderboard, "entries", lambda task: (kept, {"other": "no maps"}))
    monkeypatch.setattr(leaderboard, "board_task", short(leaderboard.board_task()))
    options = ["--seeds", "1", "--steps", "2", "--out", str(tmp_path)]
    leaderboard.main(options)
    results = json.loads((tmp_path / "leaderboard.json").read_text())
    assert set(results["methods"]) == {"ce", "kd", "bd_kd"} and results["teacher"]["n"] == 1
    weights = [(tmp_path / "runs" / slug / "runs" / "teacher-0.safetensors").read_bytes() for slug in kept]
    assert weights[0] == weights[1] == weights[2]
    stored = tmp_path / "runs" / "kd" / "runs" / "kd-0.json"
    stored.write_text(
        json.dumps(json.loads(stored.read_text()) | {"test": 0.125, "commit": "0" * 40, "peak_rss_mb": 1e6})
    )
    leaderboard.main(options)
    results = json.loads((tmp_path / "leaderboard.json").read_text())
    assert results["methods"]["kd"]["test"] == [0.125] and results["machine"]["peak_rss_mb"] == 1e6
    assert "0" * 40 in results["commit"].split(", ")  # of the piece, not of the moment of the report
    text = (tmp_path / "leaderboard.md").read_text()
    assert "- other: no maps" in text and "| bd_kd (online=False) |" in text
    assert (tmp_path / "leaderboard.png").read_bytes()[:4] == b"\x89PNG"


def short(task):
    import dataclasses

    return lambda: dataclasses.replace(task, teacher_steps=2)


def test_the_table_is_in_order_with_verdicts():
    scores = {"ce": [0.5, 0.5, 0.5], "kd": [0.6, 0.61, 0.6], "good": [0.8, 0.81, 0.81]}
    results = {
        "task": "t", "score": "accuracy", "seeds": [0, 1, 2], "steps": 9, "teacher": {"test": [0.9] * 3}, "left_out": {},
        "versions": {"kdfast": "0", "torch": "9"}, "machine": {"threads": 1, "peak_rss_mb": 1.0}, "commit": None,
        "methods": {
            slug: arm(values, options={}, against_kd=compare(values, scores["kd"]), against_ce=compare(values, scores["ce"]))
            for slug, values in scores.items()
        },
    }  # fmt: skip
    lines = [line for line in leaderboard.markdown(results).splitlines() if line.startswith("| ")]
    assert [line.split()[1] for line in lines] == ["method", "good", "kd", "ce"]
    assert "+20.3, gain" in lines[1] and "-10.3, loss" in lines[3] and lines[2].count("| - |") == 1
