"""TRL's generalized JSD loss beside ours: as a function, over its options, and in its trainer."""

import copy

import lm
import pytest
import torch

from kdfast.integrations.trl import generalized_jsd_loss

pytestmark = pytest.mark.filterwarnings("ignore")  # TRL's and its imports' own


@pytest.fixture(scope="module")
def peer():
    trainer = pytest.importorskip("trl.experimental.gkd", exc_type=ImportError)
    return trainer.GKDTrainer


def inputs():
    generator = torch.Generator().manual_seed(3)
    student, teacher = (2 * torch.randn(3, 7, 19, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(19, (3, 7), generator=generator)
    labels[0, :3] = labels[2, 5:] = -100
    return student.requires_grad_(), teacher, labels


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("with_labels", [True, False])
def test_is_trls(peer, beta, with_labels):
    student, teacher, labels = inputs()
    labels = labels if with_labels else None
    for more in (
        {},
        {"reduction": "sum"},
        {"reduction": "mean"},
        {"num_items_in_batch": 40},
        {"num_items_in_batch": torch.tensor(7)},
    ):
        got, want = (
            loss(student, teacher, labels=labels, beta=beta, temperature=2.0, **more)
            for loss in (generalized_jsd_loss, peer.generalized_jsd_loss)
        )
        assert want.item() > 1e-3
        torch.testing.assert_close(got, want, rtol=1e-7, atol=0)
        grads = [torch.autograd.grad(loss, student)[0] for loss in (got, want)]
        torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-10)


def test_no_kept_token_and_wrong_reduction(peer):
    student, teacher, labels = inputs()
    for loss in (generalized_jsd_loss, peer.generalized_jsd_loss):
        assert loss(student, teacher, labels=torch.full_like(labels, -100)).item() == 0
    nothing = generalized_jsd_loss(student, teacher, torch.full_like(labels, -100), num_items_in_batch=0)
    (grad,) = torch.autograd.grad(nothing, student)
    assert nothing.item() == 0 and (grad == 0).all()
    with pytest.raises(ValueError, match="reduction"):
        generalized_jsd_loss(student, teacher, reduction="none")


def test_in_trls_trainer(peer, tmp_path):
    """GKDTrainer with our function in place of its own: the same steps on the same samples of the student."""
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig

    class FusedGKDTrainer(peer):
        generalized_jsd_loss = staticmethod(generalized_jsd_loss)

    tokenizer = copy.deepcopy(lm.tokenizer(300))
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    turns = [
        [{"role": "user", "content": text[:30]}, {"role": "assistant", "content": text[30:80]}] for text in lm.TEXTS[:4]
    ]
    losses = []
    for kind in (FusedGKDTrainer, peer):
        args = GKDConfig(
            str(tmp_path), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2, logging_steps=1, lmbda=0.5,
            beta=0.3, max_new_tokens=8, max_length=64, report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True,
            bf16=False, gradient_checkpointing=False, seed=0,
        )  # fmt: skip
        trainer = kind(
            lm.llama(300, 32), teacher_model=lm.llama(300, 48, seed=1), args=args, processing_class=tokenizer,
            train_dataset=Dataset.from_dict({"messages": turns}),
        )  # fmt: skip
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert len(losses[1]) == 2 and min(losses[1]) > 0.05
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
