"""The programs in examples/: a few steps of each learn something, and what they return is what they print."""

import importlib.util
import re
from pathlib import Path

import pytest

pytest.importorskip("sklearn")

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def falls(losses, factor):
    assert sum(losses[-5:]) < factor * sum(losses[:5]), losses


def test_logit_kd_in_a_plain_loop(capsys):
    found = example("logit_kd").main(steps=120)
    assert list(found) == ["teacher", "alone", "distilled"]
    for losses, score in found.values():
        falls(losses, 0.6)
        assert 0.6 < score <= 1
    assert found["distilled"][0] != found["alone"][0]  # the changed line changes something
    assert f"distilled: test accuracy {found['distilled'][1]:.3f}" in capsys.readouterr().out


def test_two_segmentation_students_teach_each_other(capsys):
    module = example("two_segmentation_students")
    losses, scores = module.main(steps=20)
    falls(losses, 0.85)
    assert set(scores) == {"cnn", "vit"} and all(1 / module.CLASSES / 2 < score < 1 for score in scores.values())
    to_cnn, to_vit = (float(number) for number in re.findall(r"to the \w+ ([\d.]+)", capsys.readouterr().out)[:2])
    assert to_cnn > 0 and to_vit > 0  # both learn from the other somewhere


def test_a_sparse_student_uses_its_experts(capsys):
    losses, accuracy, load = example("sparse_student").main(steps=80)
    falls(losses, 0.6)
    assert accuracy > 0.6
    assert load.sum() == 80 * 64 * 8 * 2  # steps, images, rows, experts of each
    assert load.max() < 0.5 * load.sum()  # no expert has all: the balance term holds
    assert f"test accuracy {accuracy:.3f}" in capsys.readouterr().out


def test_each_is_named_in_the_readme():
    text = (EXAMPLES.parent / "README.md").read_text()
    for path in EXAMPLES.glob("*.py"):
        assert f"examples/{path.name}" in text, path.name
