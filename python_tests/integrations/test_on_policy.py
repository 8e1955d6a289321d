"""On-policy distillation: what is sampled, what of it counts, and that KDTrainer trains on it with the right denominators."""

import lm
import pytest
import torch

pytest.importorskip("transformers")

from integrations import ddp
from integrations.test_causal_lm import plain_loss, rows_of

from kdfast.integrations.on_policy import prompts_of, sampled_batch

pytestmark = pytest.mark.filterwarnings("ignore")


def test_prompts_are_what_stands_before_the_labels():
    batch = {
        "input_ids": torch.tensor([[5, 6, 7, 8, 1], [1, 9, 10, 11, 12]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 0], [0, 1, 1, 1, 1]]),
        "labels": torch.tensor([[-100, -100, 7, -100, -100], [-100, -100, -100, 11, 12]]),
    }
    tokens, mask = prompts_of(batch, 1)
    assert tokens.tolist() == [[5, 6], [9, 10]] and mask.tolist() == [[1, 1], [1, 1]]
    del batch["labels"]
    tokens, mask = prompts_of(batch, 1)
    assert tokens.tolist() == [[5, 6, 7, 8], [9, 10, 11, 12]]
    batch["labels"] = batch["input_ids"]
    with pytest.raises(ValueError, match="row 0 has none"):
        prompts_of(batch, 1)


def test_sampled_answers_count_up_to_their_end():
    student = lm.llama(ddp.VOCAB, 32).train()
    with torch.no_grad():  # <eos> (0) is likely, so that some answers end early
        student.lm_head.weight[0] += 0.5 * student.lm_head.weight.std(0)
    batch = rows_of()
    batch["labels"][:, :3] = -100
    torch.manual_seed(0)
    found = sampled_batch(student, batch, max_new_tokens=12, pad_token_id=1)
    torch.manual_seed(0)
    again = sampled_batch(student, batch, max_new_tokens=12, pad_token_id=1)
    assert student.training and found["on_policy"] is True and torch.equal(found["input_ids"], again["input_ids"])
    prompts, _ = prompts_of(batch, 1)
    width = prompts.shape[1]
    assert torch.equal(found["input_ids"][:, :width], prompts) and (found["labels"][:, :width] == -100).all()
    for tokens, labels, attention in zip(found["input_ids"], found["labels"], found["attention_mask"]):
        answer = tokens[width:].tolist()
        n = answer.index(0) + 1 if 0 in answer else len(answer)
        assert labels[width:].tolist() == [*answer[:n], *[-100] * (len(answer) - n)]
        assert attention[width:].sum() == n


def test_trainer_on_what_the_student_samples(tmp_path):
    """Every step is the reverse KL of the sampled tokens, one mean over all micro-batches, without cross-entropy."""
    batches = []
    kd = ddp.trainer(
        tmp_path, on_policy=1.0, max_new_tokens=8, kind="reverse_kl", gradient_accumulation_steps=2, steps=2,
        per_device_train_batch_size=2, temperature=1.0, rows=8, data_collator=prompted,
    )  # fmt: skip
    sampled = kd._sampled

    def recorded(model, batch):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        batches.append((before, sampled(model, batch)))
        return batches[-1][1]

    kd._sampled = recorded
    kd.train()
    assert len(batches) == 4
    logged = [row for row in kd.state.log_history if "loss" in row]
    for step, row in enumerate(logged):
        pair, student = batches[2 * step : 2 * step + 2], lm.llama(ddp.VOCAB, 32).double()
        student.load_state_dict(pair[0][0])
        total = count = 0.0
        for _, batch in pair:
            batch = {name: value for name, value in batch.items() if name != "on_policy"}
            n = (batch["labels"] != -100).sum().item()
            both = plain_loss(student, kd.teacher, batch, kind="reverse_kl", reduction="sum").item()
            logits = student(**{name: value for name, value in batch.items() if name != "labels"}).logits[:, :-1]
            ce = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
            ).item()
            total, count = total + both - 0.5 * ce, count + n
        assert row["loss"] == pytest.approx(total / count, rel=1e-5) and row["kd"] == pytest.approx(
            2 * row["loss"], rel=1e-5
        )
    assert not torch.equal(batches[0][1]["input_ids"], batches[2][1]["input_ids"])


def prompted(rows):
    batch = ddp.padded()(rows)
    batch["labels"][:, :4] = -100
    return batch


def test_a_share_of_the_steps(tmp_path):
    kd = ddp.trainer(tmp_path, on_policy=0.5, steps=2)
    drawn = []
    for step in range(200):
        kd.state.global_step = step
        drawn.append(kd._samples_now())
    assert 70 < sum(drawn) < 130
    kd.state.global_step = 17
    assert kd._samples_now() == drawn[17]
