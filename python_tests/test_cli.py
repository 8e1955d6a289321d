"""The commands: what they print and write, where they stop, and what is said without the extra."""

import dataclasses
import json
import subprocess
import sys

import pytest

pytest.importorskip("typer")
pytest.importorskip("accelerate")

import torch
from safetensors.torch import load_file

from kdfast import cli, doctor, experiment
from kdfast.catalogue import CATALOGUE
from kdfast.data import load_task


def call(capsys, *arguments):
    """(exit code, stdout, stderr) of a command."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(arguments))
    captured = capsys.readouterr()
    return stopped.value.code, captured.out, captured.err


# ---------------------------------------------------------------- distill
@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One short run of the main job."""
    out = tmp_path_factory.mktemp("demo") / "run"
    before = torch.get_num_threads()
    results = experiment.run("digits", "dkd", seeds=2, steps=80, out=out, options={"beta": 2.0})
    assert torch.get_num_threads() == before
    return out, results


def test_the_job_writes_its_four_files(finished):
    out, results = finished
    stored = json.loads((out / "results.json").read_text())
    assert stored == json.loads(json.dumps(results))
    assert list(stored["arms"]) == ["teacher", "ce", "kd", "dkd"] and stored["seeds"] == [0, 1]
    for arm in stored["arms"].values():
        assert arm["n"] == 2 and arm["mean"] == pytest.approx(sum(arm["test"]) / 2) and arm["ms_per_step"] > 0
    assert stored["arms"]["teacher"]["mean"] > 0.9  # it did learn
    assert stored["settings"]["options"] == {"beta": 2.0} and stored["versions"]["torch"] == torch.__version__
    assert {(c["arm"], c["against"]) for c in stored["comparisons"]} == {("kd", "ce"), ("dkd", "ce"), ("dkd", "kd")}
    assert (out / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_the_report_says_what_the_numbers_say(finished):
    out, results = finished
    text = (out / "report.md").read_text()
    for comparison in results["comparisons"]:
        assert comparison["sentence"] in text and f": {comparison['verdict']};" in comparison["sentence"]
    assert "kdfast distill --data digits --method dkd --seeds 2 --steps 80 --option beta=2.0" in text
    assert "![test scores and validation curves](curves.png)" in text


def test_the_student_is_the_best_on_validation(finished):
    out, results = finished
    chosen = results["student"]
    assert chosen["arm"] == "dkd" and results["arms"]["dkd"]["val"][chosen["seed"]] == max(
        results["arms"]["dkd"]["val"]
    )
    student = load_file(out / "student.safetensors")
    assert torch.equal(
        student["head.weight"], load_file(out / "runs" / f"dkd-{chosen['seed']}.safetensors")["head.weight"]
    )


def test_a_stopped_run_trains_only_what_is_missing(finished, monkeypatch):
    out, results = finished
    (out / "runs" / "kd-1.json").unlink()
    trained = []
    original = experiment._train_arm
    monkeypatch.setattr(
        experiment,
        "_train_arm",
        lambda task, arm, seed, **rest: trained.append((arm.name, seed)) or original(task, arm, seed, **rest),
    )
    again = experiment.run("digits", "dkd", seeds=2, steps=80, out=out, options={"beta": 2.0})
    assert trained == [("kd", 1)]
    assert again["arms"]["kd"]["test"] == results["arms"]["kd"]["test"]  # the same seed, the same student


def test_other_settings_in_the_same_folder_are_refused(finished):
    out, _ = finished
    with pytest.raises(ValueError, match="holds a run with other settings"):
        experiment.run("digits", "dkd", seeds=2, steps=81, out=out, options={"beta": 2.0})


def test_distill_prints_the_table_the_sentences_and_last_the_path(finished, capsys):
    out, results = finished
    code, text, _ = call(
        capsys, "distill", "--method", "dkd", "--seeds", "2", "--steps", "80", "--option", "beta=2.0", "--out", str(out)
    )
    assert code == 0
    for name, arm in results["arms"].items():
        assert name in text and f"{100 * arm['mean']:.2f}" in text
    assert text.splitlines()[-1] == f"report: {out / 'report.md'}"


def test_two_students_are_scored_together_and_need_no_teacher(tmp_path):
    task = dataclasses.replace(load_task("digits"), peers=True, teacher=load_task("digits").student)
    results = experiment.run(task, "mutual", seeds=1, steps=40, out=tmp_path)
    assert list(results["arms"]) == ["ce", "mutual"]
    row = json.loads((tmp_path / "runs" / "mutual-0.json").read_text())
    assert len(row["each"]) == 2 and row["test"] == pytest.approx(sum(row["each"]) / 2)
    assert results["comparisons"][0]["sentence"].endswith("one seed decides nothing.")
    with pytest.raises(ValueError, match="kd is for a trained teacher, digits has two students"):
        experiment.run(task, "kd", out=tmp_path / "other")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "imagenet"], "data: expected one of digits"),
        (["--method", "dkdd"], "method: there is no 'dkdd'; did you mean dkd"),
        (
            ["--method", "mutual", "--data", "digits"],
            "mutual is for two students that teach each other, digits has a trained teacher",
        ),
        (["--option", "temprature=2"], "unknown option temprature"),
        (["--option", "temperature"], "option: expected NAME=VALUE, got 'temperature'"),
    ],
)
def test_mistakes_are_one_line_and_train_nothing(arguments, message, tmp_path, capsys):
    code, _, error = call(capsys, "distill", "--out", str(tmp_path / "out"), *arguments)
    assert code == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- methods, doctor, missing extra
def test_methods_lists_the_catalogue_and_shows_one(capsys):
    code, text, _ = call(capsys, "methods")
    assert code == 0 and all(row.slug in text and row.title in text for row in CATALOGUE)
    code, text, _ = call(capsys, "methods", "kd")
    assert code == 0 and "1503.02531" in text and "Hinton" in text
    code, _, error = call(capsys, "methods", "sinkdd")
    assert code == 2 and "did you mean sinkd" in error


def test_doctor_names_backends_with_reasons(capsys, monkeypatch):
    code, text, _ = call(capsys, "doctor")
    assert code == 0 and text.startswith("kdfast ") and "reference available" in text
    absent = {
        "kdfast": "0", "torch": "0", "compiled": False, "gpu": None, "forced_backend": "reference",
        "cpu": {"available": False, "reason": "no core"}, "triton": {"available": False, "version": "3", "reason": "no GPU"},
    }  # fmt: skip
    lines = "\n".join(doctor.describe(absent))
    assert "cpu       not used: no core" in lines and "triton    not used: no GPU (version 3)" in lines
    assert "KDFAST_BACKEND forces reference" in lines and "KDFAST_CORE=1" in lines


def test_bench_lines_give_a_ratio_per_case_of_equal_losses():
    generator = torch.Generator().manual_seed(0)
    s, t = torch.randn(8, 5, generator=generator), torch.randn(8, 5, generator=generator)
    for name, _, ours, plain in doctor.CASES:
        torch.testing.assert_close(ours(s, t, torch.arange(8) % 5), plain(s, t, torch.arange(8) % 5), msg=name)
    lines = list(doctor.bench_lines(seconds=0.0))
    assert len(lines) == 1 + len(doctor.CASES) and all(line.endswith("x") for line in lines[1:])


def test_without_the_extra_a_line_says_what_to_install():
    code = (
        "import sys, warnings; warnings.simplefilter('ignore')\n"
        "for name in ('typer', 'accelerate'): sys.modules[name] = None\n"  # importing them raises ImportError
        "import kdfast, kdfast.losses, kdfast.methods\n"
        "try: import kdfast.train\n"
        "except ImportError as error: print(error)\n"
        "from kdfast.cli import main; main([])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "pip install 'kdfast[train]'" in done.stderr and "pip install 'kdfast[train]'" in done.stdout
