"""`kdfast distill-lm`: a small run from end to end, a stop in the middle, models and data by name, what the sentences are made of."""

import json
import math
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("typer")
pytest.importorskip("accelerate")
pytest.importorskip("transformers")

from kdfast import cli, lm_experiment, lm_report
from kdfast.data.stdlib_text import stdlib_text
from kdfast.data.teacher_cache import store
from kdfast.experiment import once
from kdfast.integrations.causal_lm import next_labels
from kdfast.lm_cost import compare_cost
from kdfast.lm_experiment import Job, RunOrder, Settings, run
from kdfast.lm_loss import LanguageLoss, head_cross_entropy, plain_loss
from kdfast.methods import Context

SMALL = Settings(
    arms=("ce", "js", "forward_kl", "topk_forward_kl"), steps=4, teacher_steps=6, batch_size=2, length=16, eval_every=2, top_k=8,
    vocab_size=320, teacher_bytes=30_000, student_bytes=12_000, val_bytes=3_000,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def tiny_models():
    """Widths of the embedded models, for every run of this file."""
    before = lm_experiment.TEACHER, lm_experiment.STUDENT
    for name, width in (("TEACHER", 32), ("STUDENT", 16)):
        setattr(
            lm_experiment, name,
            {"hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2},
        )  # fmt: skip
    yield
    lm_experiment.TEACHER, lm_experiment.STUDENT = before


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("lm") / "run"
    return out, run(SMALL, seeds=2, out=out)


def test_the_job_writes_what_it_returns(finished):
    out, results = finished
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    assert list(results["arms"]) == list(SMALL.arms) and results["seeds"] == [0, 1]
    for arm in results["arms"].values():
        values = arm["bits_per_byte"]
        assert arm["n"] == 2 and arm["mean"] == pytest.approx(sum(values) / 2) and 0 < arm["mean"] < 16
        assert [curve[-1][1] for curve in arm["curves"]] == values and arm["tokens_per_second"] > 0
    first = results["arms"]["ce"]["bits_per_byte"]
    assert first[0] != first[1]  # a seed is other weights
    for name in (
        "curves.png",
        "report.md",
        "teacher/config.json",
        "students/js-1/model.safetensors",
        "students/js-1/tokenizer.json",
    ):
        assert (out / name).stat().st_size > 0
    assert not [path for path in (out / "runs").iterdir() if path.is_dir()]  # no checkpoint is left
    assert results["versions"]["transformers"] and results["text"]["val"]["tokens"] > 100


def test_the_report_says_what_the_numbers_say(finished):
    out, results = finished
    text = (out / "report.md").read_text()
    assert {(c["arm"], c["against"]) for c in results["comparisons"]} == {
        ("js", "ce"), ("forward_kl", "ce"), ("topk_forward_kl", "ce"), ("topk_forward_kl", "forward_kl"),
    }  # fmt: skip
    for comparison in results["comparisons"]:
        assert comparison["sentence"] in text and f": {comparison['verdict']};" in comparison["sentence"]
    for sentence in lm_report.cost_sentences(results["cost"]):
        assert sentence in text
    assert "kdfast distill-lm --seeds 2 --kinds ce,js,forward_kl,topk_forward_kl --steps 4" in text


def test_fewer_bits_are_a_gain():
    found = lm_report.comparisons({"ce": [3.0, 3.1, 3.2], "js": [2.9, 3.01, 3.1], "topk_js": [3.3, 3.41, 3.5]})
    verdicts = {(c["arm"], c["against"]): c["verdict"] for c in found}
    assert verdicts == {("js", "ce"): "gain", ("topk_js", "ce"): "loss", ("topk_js", "js"): "loss"}
    row = {"ms": 2.0, "tokens_per_second": 50.0, "peak_mb": 30.0}
    cost = {
        "parts": {
            "step": {lm_report.OURS: row, lm_report.PLAIN: {"ms": 1.0, "tokens_per_second": 100.0, "peak_mb": 120.0}}
        }
    }
    assert lm_report.cost_sentences(cost) == [
        "step: 50 tokens/s against 100 of the plain loss, 2.00 times slower; peak memory 30.0 MB against 120.0, 0.25 of it."
    ]


def test_bits_per_byte_by_hand(finished):
    """From logits of whole documents, in float64, where a document fits into a window."""
    out, _ = finished
    job = Job(replace(SMALL, length=10_000), out)
    model, windows = job.teacher, job.validation
    assert len(windows.input_ids) == len(job.documents["val"])
    nats = 0.0
    for text in job.documents["val"]:
        ids = [job.tokenizer.eos_token_id, *job.tokenizer.encode(text, add_special_tokens=False)]
        log_q = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        nats -= log_q[torch.arange(len(ids) - 1), ids[1:]].sum().item()
    n_bytes = sum(len(text.encode()) for text in job.documents["val"])
    assert lm_experiment.bits_per_byte(model, windows) == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)


# ---------------------------------------------------------------- stop and go on
class Stop(Exception): ...


def test_a_run_stopped_inside_a_piece_ends_at_the_same_numbers(finished, tmp_path, monkeypatch):
    _, results = finished
    settings = replace(SMALL, arms=("ce", "js"))
    calls = {"js": 0}
    original = LanguageLoss.__call__

    def stopping(self, context):
        calls["js"] += self.kind == "js"
        if calls["js"] == 4:  # seed 0, its last step
            raise Stop
        return original(self, context)

    monkeypatch.setattr(lm_experiment, "SAVE_EVERY", 3)
    monkeypatch.setattr(LanguageLoss, "__call__", stopping)
    with pytest.raises(Stop):
        run(settings, seeds=1, out=tmp_path)
    assert (tmp_path / "runs" / "js-0").is_dir() and not (tmp_path / "runs" / "js-0.json").exists()
    steps = []
    monkeypatch.setattr(
        LanguageLoss, "__call__", lambda self, context: steps.append(context.step) or original(self, context)
    )
    again = run(settings, seeds=1, out=tmp_path)
    assert steps == [3]  # the last step of js
    assert again["arms"]["js"]["bits_per_byte"] == results["arms"]["js"]["bits_per_byte"][:1]
    with pytest.raises(ValueError, match="holds a run with other settings"):
        run(replace(settings, steps=5), seeds=1, out=tmp_path)


# ---------------------------------------------------------------- what is read
def test_no_row_comes_again_before_all_have_come():
    order = RunOrder(10, 4, seed=3)
    read = []
    for epoch in range(5):
        order.set_epoch(epoch)
        read += list(order)
        assert list(order) == read[-4:] and len(order) == 4  # as after a resume
    assert sorted(read[:10]) == sorted(read[10:]) == list(range(10)) and read[:10] != read[10:]
    assert list(RunOrder(10, 10, seed=4)) != list(RunOrder(10, 10, seed=3)) == read[:10]
    assert sorted(list(RunOrder(3, 7, seed=0))[:6]) == [0, 0, 1, 1, 2, 2]


def test_the_cache_holds_what_the_students_read(finished, tmp_path, monkeypatch):
    """A stop while it is written, more seeds later: the same 8 rows, which every student reads once."""
    _, results = finished
    settings = replace(SMALL, arms=("ce", "topk_forward_kl"))
    written, write_shard = [], store._write_shard

    def stopping(*arguments):
        if len(written) == 2:
            raise Stop
        written.append(arguments[3])
        write_shard(*arguments)

    monkeypatch.setattr(store, "_write_shard", stopping)
    with pytest.raises(Stop):
        run(settings, seeds=1, out=tmp_path)
    monkeypatch.setattr(store, "_write_shard", lambda *a: written.append(a[3]) or write_shard(*a))
    read: dict[str, list[int]] = {}
    original = LanguageLoss.__call__

    def recording(self, context):
        read.setdefault(f"{self.kind} {self.listed is not None}", []).extend(context.batch["row_id"].tolist())
        return original(self, context)

    monkeypatch.setattr(LanguageLoss, "__call__", recording)
    again = run(settings, seeds=1, out=tmp_path)
    assert sorted(set(written)) == sorted(written) and len(written) > 2  # none twice
    manifest = json.loads((tmp_path / "cache" / "manifest.json").read_text())
    assert manifest["rows"] == again["cache"]["rows"] == 8 == SMALL.steps * SMALL.batch_size
    assert "The cache holds the 8 rows" in (tmp_path / "report.md").read_text()
    assert sorted(read["forward_kl True"]) == list(range(8))
    job = Job(settings, tmp_path)
    whole, chosen = job.rows("student"), job.student_rows
    assert len(whole) > 3 * len(chosen) == 24
    texts = [row["input_ids"].tolist() for row in whole]
    places = [texts.index(row["input_ids"].tolist()) for row in chosen]
    assert places == sorted(set(places)) and places[-1] > len(whole) // 2  # of all of it, not the beginning
    monkeypatch.setattr(lm_experiment, "cache_teacher", None)  # it is there
    read.clear()
    more = run(settings, seeds=2, out=tmp_path)
    assert sorted(read["forward_kl True"]) == list(range(8)) and sorted(read["None False"]) == list(range(8))
    for name in ("ce", "topk_forward_kl"):
        assert more["arms"][name]["bits_per_byte"] == results["arms"][name]["bits_per_byte"]
    assert len(Job(replace(settings, steps=1000), tmp_path).student_rows) == len(whole)


# ---------------------------------------------------------------- names
def test_a_token_added_to_the_student_is_no_class(finished, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out, _ = finished
    for name, token in (("teacher", None), ("students/ce-0", "<new>")):
        model, tokenizer = (kind.from_pretrained(out / name) for kind in (AutoModelForCausalLM, AutoTokenizer))
        model.resize_token_embeddings(328)  # padded heads
        model.save_pretrained(tmp_path / name)
        if token is not None:
            tokenizer.add_tokens([token])
        tokenizer.save_pretrained(tmp_path / name)
    known = len(AutoTokenizer.from_pretrained(out / "teacher"))
    settings = replace(SMALL, teacher=str(tmp_path / "teacher"), student=str(tmp_path / "students" / "ce-0"))
    job = Job(settings, tmp_path / "run")
    assert len(job.tokenizer) == job.agreed == known < 328 and job.classes(job.student(0)) == known
    same = Job(replace(settings, student=settings.teacher), tmp_path / "run")
    assert same.agreed is None and same.classes(same.student(0)) == 328
    other = Job(replace(settings, teacher=settings.student, student=settings.teacher), tmp_path / "run")
    with pytest.raises(ValueError, match=rf"another tokenizer .*here and there id {known} is no token and '<new>'"):
        other.tokenizer  # noqa: B018


def test_models_and_data_by_name(finished, tmp_path, capsys):
    out, _ = finished
    texts = tmp_path / "texts"
    texts.mkdir()
    rows = [text[at : at + 400] for text in stdlib_text("train", max_bytes=30_000) for at in range(0, len(text), 400)]
    (texts / "some.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    arguments = [
        "distill-lm", "--teacher", str(out / "teacher"), "--student", str(out / "students" / "ce-0"), "--data", str(texts),
        "--kinds", "ce,reverse_kl,topk_js", "--seeds", "1", "--steps", "2", "--batch-size", "2", "--length", "16", "--out", str(tmp_path / "run"),
    ]  # fmt: skip
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    text = capsys.readouterr().out
    assert stopped.value.code == 0, text
    assert text.splitlines()[-1] == f"report: {tmp_path / 'run' / 'report.md'}"
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert list(results["arms"]) == ["ce", "reverse_kl", "topk_js"] and results["teacher"]["curve"] == []
    assert results["settings"]["teacher"] == str(out / "teacher") and not (tmp_path / "run" / "teacher").exists()
    assert "one seed decides nothing" in " ".join(text.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kinds", "ce,kl"], "kinds: expected different ones of ce, forward_kl"),
        (["--kinds", "ce,ce"], "kinds: expected different ones"),
        (["--kinds", "topk_binary"], "kinds: expected different ones"),
        (["--data", "./nowhere"], "data: no file or folder './nowhere'"),
    ],
)
def test_mistakes_are_one_line(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["distill-lm", "--out", str(tmp_path / "out"), *arguments])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and error.count("\n") == 1


def test_without_transformers_the_extra_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["distill-lm", "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2 and "pip install 'kdfast[hf]'" in capsys.readouterr().err


# ---------------------------------------------------------------- losses
def models_and_batch():
    from lm import llama

    batch = {"input_ids": torch.randint(300, (2, 9), generator=torch.Generator().manual_seed(0))}
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][0, :3] = -100
    return llama(hidden=16), llama(hidden=32, seed=1), batch


def test_our_loss_is_the_plain_one_with_the_gradient_of_every_parameter():
    student, teacher, batch = models_and_batch()
    method, labels = LanguageLoss(), next_labels(batch)
    with torch.no_grad():
        taught, z = method.teacher_forward(teacher, batch), teacher(batch["input_ids"]).logits
    ours = method(Context(method.student_forward(student, batch), taught, None, batch)).loss
    plain = plain_loss(student(batch["input_ids"]).logits, z, labels)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
    parameters = list(student.parameters())
    for got, want in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(plain, parameters)):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rows", [100, 3])
def test_labels_alone_are_cross_entropy_of_the_next_token(rows, monkeypatch):
    """In one chunk, and in chunks of 3 rows."""
    student, _, batch = models_and_batch()
    monkeypatch.setattr("kdfast.lm_loss.LOGIT_BYTES", 4 * 300 * rows)
    method = LanguageLoss(None)
    loss = method(Context(method.student_forward(student, batch), None, None, batch)).loss
    logits = student(batch["input_ids"]).logits
    plain = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-6)
    parameters = list(student.parameters())
    for got, want in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(plain, parameters)):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        nothing = torch.full_like(batch["labels"], -100)
        assert head_cross_entropy(method.student_forward(student, batch), nothing) == 0


def test_costs_are_of_the_same_loss():
    student, teacher, batch = models_and_batch()
    cost = compare_cost(student, teacher, batch, 300, rounds=1)
    assert list(cost["parts"]) == ["training step", "heads and loss"]
    for forms in cost["parts"].values():
        assert set(forms) == {lm_report.OURS, lm_report.PLAIN} and all(
            row["tokens_per_second"] > 0 for row in forms.values()
        )


def test_a_piece_is_made_once(tmp_path):
    made = []
    for _ in range(2):
        once(tmp_path / "piece.json", lambda: made.append(1) or {"a": 1})
    assert made == [1]
