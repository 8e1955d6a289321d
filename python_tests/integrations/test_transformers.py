"""KDTrainer does what a plain loop over all logits does, however the work is cut: micro-batches, padding, processes, restarts."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

import lm
import pytest
import torch
from torch.utils.data import Subset

pytest.importorskip("transformers")

from integrations import ddp
from integrations.test_causal_lm import plain_loss

from kdfast.integrations.transformers import KDTrainer, KDTrainingArguments, check_same_tokens

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' and accelerate's own


def plain_run(steps: int = 4, batch_size: int = 4, side: str = "right"):
    """The same training by hand: batches in the Trainer's order, SGD with its schedule, clipped."""
    student, teacher = lm.llama(ddp.VOCAB, 32).double().train(), lm.llama(ddp.VOCAB, 48, seed=1).double()
    kd = ddp.trainer("unused", side=side, per_device_train_batch_size=batch_size, steps=steps)
    losses, loader = [], list(kd.get_train_dataloader())
    assert len(loader) * batch_size == 16
    for step in range(steps):
        batch = {name: value for name, value in loader[step].items() if name != "row_id"}
        loss = plain_loss(student, teacher, batch, kind="js", temperature=2.0)
        student.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        with torch.no_grad():
            for parameter in student.parameters():
                parameter -= 0.05 * (1 - step / steps) * parameter.grad
        losses.append(loss.item())
    return losses, student.state_dict()


def losses_of(kd: KDTrainer) -> list[float]:
    return [row["loss"] for row in kd.state.log_history if "loss" in row]


def check_weights(got: dict, want: dict, tolerance: float = 1e-6) -> None:
    for name, value in want.items():
        torch.testing.assert_close(
            got[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.fixture(scope="module")
def plain():
    losses, weights = plain_run()
    start = lm.llama(ddp.VOCAB, 32).double().state_dict()
    assert max((weights[name] - start[name]).abs().max() for name in weights) > 1e-2  # it has trained
    return losses, weights


@pytest.mark.parametrize(
    "options",
    [{}, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}, {"side": "left"}, {"use_logits": True}],
    ids=["whole", "accumulated", "left", "logits"],
)
def test_equals_a_plain_loop(plain, tmp_path, options):
    losses, weights = plain
    kd = ddp.trainer(tmp_path, **options)
    kd.train()
    # the Trainer's own sums of losses are float32, and norms and rotary angles of the models are float32
    assert losses_of(kd) == pytest.approx(losses, rel=1e-5)
    check_weights(kd.model.state_dict(), weights)
    for row in kd.state.log_history[: len(losses)]:
        assert row["loss"] == pytest.approx(0.5 * row["ce"] + 0.5 * row["kd"], rel=1e-5)


def test_resumed_equals_uninterrupted(tmp_path):
    whole = ddp.trainer(
        tmp_path / "whole", save_strategy="steps", save_steps=2, optim="adamw_torch", learning_rate=1e-2
    )
    whole.train()
    again = ddp.trainer(tmp_path / "again", optim="adamw_torch", learning_rate=1e-2)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert losses_of(again)[-2:] == losses_of(whole)[-2:] and len(losses_of(whole)) == 4
    check_weights(again.model.state_dict(), whole.model.state_dict(), tolerance=0)
    saved = {path.name for path in (tmp_path / "whole" / "checkpoint-2").iterdir()}
    assert "model.safetensors" in saved
    assert (
        tmp_path / "whole" / "checkpoint-2" / "model.safetensors"
    ).stat().st_size < 8 * 1.2 * whole.model.num_parameters()


def test_two_processes_equal_one(tmp_path):
    if not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = Path(__file__).parents[2]
    base = {**os.environ, "PYTHONPATH": str(root), "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    ranks = [
        base | {"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for r in (0, 1)
    ]  # fmt: skip
    (tmp_path / "two").mkdir()
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", ddp.__file__, str(tmp_path / "two")], env=env, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )
        for env in ranks
    ]  # fmt: skip
    one = ddp.trainer(tmp_path / "one", gradient_accumulation_steps=2, steps=2)
    one.train()
    want = ddp.report(one)
    outputs = [process.communicate(timeout=240)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(outputs)
    two = json.loads((tmp_path / "two" / "report.json").read_text())
    assert two["processes"] == 2 and len(two["steps"]) == 2
    for found in (two, json.loads((tmp_path / "two" / "sharded.json").read_text())):
        for got, row in zip(found["steps"], want["steps"], strict=True):
            assert got == pytest.approx(row, rel=1e-5)
        for name in ("eval_loss", "eval_ce", "eval_kd"):  # over the 11 rows, each once
            assert found["eval"][name] == pytest.approx(want["eval"][name], rel=1e-5)
    check_weights(torch.load(tmp_path / "two" / "weights.pt"), one.model.state_dict())
    # FSDP takes the mean over processes of the gradients of their halves' sums
    whole = ddp.sharded_gradients("none")
    assert whole["loss"] > 10
    for form in ("fsdp1", "fsdp2"):
        sharded = torch.load(tmp_path / "two" / f"{form}.pt")
        assert sharded["loss"] == pytest.approx(whole["loss"], rel=1e-5)
        largest = max(grad.abs().max() for grad in whole["grads"].values())
        for name, grad in whole["grads"].items():
            torch.testing.assert_close(2 * sharded["grads"][name], grad, rtol=1e-4, atol=1e-5 * largest.item())


def test_evaluation_is_the_mean_over_all_tokens(tmp_path):
    """Whatever the batches: the last one is smaller here, and rows keep different numbers of tokens."""
    kd = ddp.trainer(tmp_path, per_device_eval_batch_size=4)
    metrics = kd.evaluate()
    everything = {k: v for k, v in ddp.padded()([*ddp.Rows(11)]).items() if k != "row_id"}
    want = plain_loss(kd.model, kd.teacher, everything, kind="js", temperature=2.0).item()
    assert metrics["eval_loss"] == pytest.approx(want, rel=1e-6)
    assert metrics["eval_loss"] == pytest.approx(0.5 * metrics["eval_ce"] + 0.5 * metrics["eval_kd"], rel=1e-6)
    assert kd.state.log_history[-1]["eval_kd"] == metrics["eval_kd"]


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}, {"use_logits": True}])
def test_a_step_without_a_learned_token_changes_nothing(tmp_path, options):
    """Not NaN, which 0 / 0 would put into every weight and the Trainer's filter would keep out of the logs."""

    def unlearned(rows):
        batch = ddp.padded()(rows)
        return batch | {"labels": torch.full_like(batch["labels"], -100)}

    kd = ddp.trainer(tmp_path, steps=2, data_collator=unlearned, logging_nan_inf_filter=False, **options)
    before = {name: value.clone() for name, value in kd.model.state_dict().items()}
    kd.train()
    assert losses_of(kd) == [0, 0] and kd.evaluate()["eval_loss"] == 0
    check_weights(kd.model.state_dict(), before, tolerance=0)


def test_compute_metrics_sees_all_logits(tmp_path):
    kd = ddp.trainer(tmp_path, per_device_eval_batch_size=11)
    kd.evaluate()  # the heads are confirmed
    kd.compute_metrics = lambda found: {"shape": found.predictions.shape, "labels": found.label_ids.shape}
    metrics = kd.evaluate()
    assert metrics["eval_shape"] == (11, 18, ddp.VOCAB) and metrics["eval_labels"] == (11, 18)


def test_models_by_name_and_vocabularies(tmp_path, caplog):
    tokenizer = lm.tokenizer(ddp.VOCAB)
    for name, model in (("student", lm.llama(ddp.VOCAB, 32)), ("teacher", lm.llama(ddp.VOCAB + 4, 48, seed=1))):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    args = KDTrainingArguments(
        str(tmp_path / "out"), teacher_model=str(tmp_path / "teacher"), teacher_model_init_kwargs={"dtype": "float32"},
        report_to="none", use_cpu=True, max_steps=1, per_device_train_batch_size=2, disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    options = {"args": args, "train_dataset": ddp.Rows(4), "data_collator": ddp.padded()}
    with caplog.at_level(logging.WARNING):
        kd = KDTrainer(str(tmp_path / "student"), processing_class=tokenizer, **options)
    assert any(f"{ddp.VOCAB} and {ddp.VOCAB + 4} classes" in record.message for record in caplog.records)
    kd.train()
    assert kd.criterion.options["vocab_size"] == ddp.VOCAB and losses_of(kd)[0] > 1
    assert not any(parameter.requires_grad for parameter in kd.teacher.parameters())
    for same in (
        tmp_path / "student",
        str(tmp_path / "student"),
    ):  # the same weights twice, of which one set is trained
        own = KDTrainer(same, teacher_model=same, processing_class=tokenizer, **options)
        assert own.model is not own.teacher and own.model.lm_head.weight.requires_grad
    with pytest.raises(ValueError, match=r"vocab_size.*300 classes and the teacher 304"):
        KDTrainer(str(tmp_path / "student"), **options)
    with pytest.raises(ValueError, match=r"teacher_processing_class.*differ.*uld_loss"):
        KDTrainer(str(tmp_path / "student"), processing_class=lm.tokenizer(280), **options)


def test_tokens_added_to_one_tokenizer():
    from copy import deepcopy

    teacher, student = lm.tokenizer(300), deepcopy(lm.tokenizer(300))
    student.add_tokens(["<a>", "<b>"])
    check_same_tokens(teacher, deepcopy(teacher))
    for pair, words in (
        ((student, teacher), "id 300 is '<a>' and no token"),
        ((teacher, student), "no token and '<a>'"),
    ):
        for classes in (None, 301, 304):
            with pytest.raises(ValueError, match=rf"{words}.*vocab_size=300 leaves the added ones out.*uld_loss"):
                check_same_tokens(*pair, classes)
        check_same_tokens(*pair, 300)
    other = deepcopy(teacher)
    other.add_tokens(["<c>"])
    with pytest.raises(
        ValueError, match=r"got 2 that differ, here and there id 300 is '<a>' and '<c>'; id 301"
    ) as told:
        check_same_tokens(student, other)
    assert "leaves" not in str(told.value)  # one id, two tokens
    with pytest.raises(ValueError, match="20 that differ") as told:  # merges that one of them has not
        check_same_tokens(lm.tokenizer(280), teacher)
    assert "leaves" not in str(told.value)


def test_vocab_size_leaves_added_tokens_out(tmp_path):
    from copy import deepcopy

    student = deepcopy(lm.tokenizer(ddp.VOCAB))
    student.add_tokens(["<new>"])

    def trainer(**options):
        args = KDTrainingArguments(
            str(tmp_path), report_to="none", use_cpu=True, max_steps=1, per_device_train_batch_size=2, disable_tqdm=True,
            logging_steps=1, save_strategy="no", **options,
        )  # fmt: skip
        return KDTrainer(
            lm.llama(ddp.VOCAB + 4, 32), args, teacher_model=lm.llama(ddp.VOCAB + 4, 48, seed=1), train_dataset=ddp.Rows(4),
            data_collator=ddp.padded(), processing_class=student, teacher_processing_class=lm.tokenizer(ddp.VOCAB),
        )  # fmt: skip

    with pytest.raises(ValueError, match=f"vocab_size={ddp.VOCAB} leaves"):
        trainer()
    kd = trainer(vocab_size=ddp.VOCAB)
    kd.train()
    assert kd.criterion.options["vocab_size"] == ddp.VOCAB and losses_of(kd)[0] > 1


def test_wrong_arguments(tmp_path):
    with pytest.raises(ValueError, match="teacher_model, teacher_cache: expected one of them, got none"):
        KDTrainer(lm.llama(), args=KDTrainingArguments(str(tmp_path)))
    with pytest.raises(ValueError, match="expected one of them, got both"):
        ddp.trainer(tmp_path, teacher_cache="somewhere")
    with pytest.raises(ValueError, match="on_policy: expected a share"):
        ddp.trainer(tmp_path, on_policy=1.5)
    model = lm.llama()
    with pytest.raises(ValueError, match="teacher_model: expected another model"):
        KDTrainer(model, args=KDTrainingArguments(str(tmp_path)), teacher_model=model)
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        ddp.trainer(tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match=r"kind: expected one of forward_kl, .* got 'jsd'"):
        ddp.trainer(tmp_path, kind="jsd")
    with pytest.raises(ValueError, match="beta: expected a finite number in"):
        ddp.trainer(tmp_path, beta=2.0)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """All classes but one of the teacher, so that the lists say what the teacher says."""
    from kdfast.data.teacher_cache import cache_teacher

    rows = [{name: torch.tensor(row[name]) for name in ("input_ids", "labels")} for row in ddp.Rows()]
    return cache_teacher(
        lm.llama(ddp.VOCAB, 48, seed=1), rows, tmp_path_factory.mktemp("cache") / "teacher", tokenizer=lm.tokenizer(ddp.VOCAB),
        top_k=ddp.VOCAB - 1, temperature=2.0, batch_size=4,
    )  # fmt: skip


@pytest.mark.parametrize("own_rows", [False, True])
def test_a_teacher_cache_is_the_teacher(plain, cache, tmp_path, own_rows):
    losses, weights = plain
    folder = str(cache.shards.folder)
    options = {"teacher_cache": folder, "teacher": False}
    kd = ddp.trainer(tmp_path, **options) if not own_rows else ddp.trainer(tmp_path, own_rows=True, **options)
    kd.train()
    assert kd.teacher is None and losses_of(kd) == pytest.approx(losses, rel=2e-4)  # lists are float16
    check_weights(kd.model.state_dict(), weights, tolerance=2e-4)


def test_parts_of_a_cache_train_and_evaluate(cache, tmp_path):
    """Subsets bring the collate of the cache with them, and no row_id is looked up."""
    train, held = Subset(cache, range(4, 16)), Subset(cache, range(4))
    args = KDTrainingArguments(
        str(tmp_path), teacher_cache=str(cache.shards.folder), temperature=2.0, kind="js", max_steps=2, report_to="none",
        per_device_train_batch_size=3, use_cpu=True, disable_tqdm=True, logging_steps=1, save_strategy="no",
    )  # fmt: skip
    kd = KDTrainer(
        lm.llama(ddp.VOCAB, 32), args, train_dataset=train, eval_dataset=held, processing_class=lm.tokenizer(ddp.VOCAB)
    )
    batch = cache.collate([cache[i] for i in range(4)])
    want = kd.criterion(kd.model, cache.pop_teacher(batch), batch)
    assert kd.evaluate()["eval_loss"] == pytest.approx(want.loss.item(), rel=1e-5)
    kd.train()
    assert len(losses_of(kd)) == 2 and min(losses_of(kd)) > 1


def test_wrong_caches(cache, tmp_path):
    options = {"teacher_cache": cache, "teacher": False}
    with pytest.raises(ValueError, match=r"temperature: expected that of the cache, 2.0, got 1.0"):
        ddp.trainer(tmp_path, temperature=1.0, **options)
    with pytest.raises(ValueError, match=r"padding on the left"):
        ddp.trainer(tmp_path, side="left", **options).train()

    def more_labels(rows):
        batch = ddp.padded()(rows)
        return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}

    with pytest.raises(ValueError, match=r"labels: token .* had no label when the cache was made"):
        ddp.trainer(tmp_path, data_collator=more_labels, **options).train()

    def without_ids(rows):
        return {name: value for name, value in ddp.padded()(rows).items() if name != "row_id"}

    with pytest.raises(ValueError, match="expected row_id"):
        ddp.trainer(tmp_path, data_collator=without_ids, **options).train()
    with pytest.raises(ValueError, match="on_policy: no cache has scored"):
        ddp.trainer(tmp_path, on_policy=1.0, **options)


def test_bf16_autocast_reads_the_heads(plain, tmp_path):
    kd = ddp.trainer(tmp_path, bf16=True, steps=2)
    kd.model.float(), kd.teacher.float()
    kd.train()
    assert [reader.reason for reader in kd.criterion.readers.values()] == [None, None]
    assert losses_of(kd) == pytest.approx(plain[0][:2], rel=2e-2)  # products of 8 bits
