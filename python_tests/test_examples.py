"""The programs in examples/: a few steps of each learn something, and what they return is what they print."""

import copy
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn")

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # where dataclasses look for their types
    spec.loader.exec_module(module)
    return module


def falls(losses, factor):
    n = min(5, len(losses) // 2)
    assert sum(losses[-n:]) < factor * sum(losses[:n]), losses


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


@pytest.mark.filterwarnings("ignore")  # transformers' and accelerate's own
def test_kd_trainer_by_name_and_again(tmp_path, capsys):
    lm = pytest.importorskip("lm")
    pytest.importorskip("transformers")
    for name, hidden in (("student", 32), ("teacher", 48)):
        lm.llama(300, hidden, seed=hidden).save_pretrained(tmp_path / name)
        lm.tokenizer(300).save_pretrained(tmp_path / name)
    (tmp_path / "corpus").mkdir()
    for i, text in enumerate(lm.TEXTS[:24]):
        (tmp_path / "corpus" / f"{i}.txt").write_text(text)
    options = {
        "model": tmp_path / "student", "teacher_model": tmp_path / "teacher", "data": tmp_path / "corpus", "output_dir": tmp_path / "out",
        "max_length": 48, "held_out": 6, "kind": "js", "learning_rate": 3e-3, "save_steps": 2, "per_device_train_batch_size": 6,
        "report_to": "none", "use_cpu": True, "logging_steps": 1,
    }  # fmt: skip
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    trainer = example("kd_trainer").main([*arguments, "--max_steps", "4"])
    falls([row["loss"] for row in trainer.state.log_history if "loss" in row], 1.0)
    printed = dict(re.findall(r"(\w+): [\d.]+ before, ([\d.]+) after", capsys.readouterr().out))
    assert set(printed) == {"loss", "ce", "kd"} and (tmp_path / "out" / "model.safetensors").exists()
    again = example("kd_trainer").main([*arguments, "--max_steps", "5"])  # from the checkpoint of step 4
    assert again.state.global_step == 5 and len([row for row in again.state.log_history if "loss" in row]) == 5


@pytest.mark.filterwarnings("ignore")  # TRL's and its imports' own
def test_trls_trainer_with_our_loss(tmp_path, capsys):
    lm = pytest.importorskip("lm")
    pytest.importorskip("trl.experimental.gkd", exc_type=ImportError)
    tokenizer = copy.deepcopy(lm.tokenizer(300))
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    for name, hidden in (("student", 32), ("teacher", 48)):
        lm.llama(300, hidden, seed=hidden).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    turns = [
        [{"role": "user", "content": text[:30]}, {"role": "assistant", "content": text[30:80]}] for text in lm.TEXTS[:8]
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns))
    options = {
        "model": tmp_path / "student", "teacher_model_name_or_path": tmp_path / "teacher", "data": tmp_path / "chats.jsonl",
        "output_dir": tmp_path / "out", "lmbda": 0.0, "max_steps": 6, "per_device_train_batch_size": 8, "learning_rate": 1e-2,
        "lr_scheduler_type": "constant", "max_length": 64, "logging_steps": 1, "report_to": "none", "use_cpu": True, "bf16": False,
    }  # fmt: skip
    trainer = example("gkd_trainer").main(
        [text for name, value in options.items() for text in (f"--{name}", str(value))]
    )
    falls([row["loss"] for row in trainer.state.log_history if "loss" in row], 0.98)
    assert re.search(r"loss: [\d.]+ at first, [\d.]+ at the end", capsys.readouterr().out)
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_each_is_named_in_the_readme():
    text = (EXAMPLES.parent / "README.md").read_text()
    for path in EXAMPLES.glob("*.py"):
        assert f"examples/{path.name}" in text, path.name
