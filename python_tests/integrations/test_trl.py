"""TRL's generalized JSD loss beside ours: as a function, over its options, and in its trainer."""

from types import SimpleNamespace

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
    with pytest.raises(ValueError, match="reduction"):
        generalized_jsd_loss(student, teacher, reduction="none")


def test_in_trls_trainer(peer):
    """Its compute_loss with our function in place of its own: the same loss and gradient."""

    class FusedGKDTrainer(peer):
        generalized_jsd_loss = staticmethod(generalized_jsd_loss)

    student, teacher, labels = inputs()
    batch = {"input_ids": labels, "attention_mask": torch.ones_like(labels), "labels": labels}
    losses = []
    for kind in (FusedGKDTrainer, peer):
        trainer = object.__new__(kind)
        trainer.beta, trainer.temperature = 0.5, 1.0
        trainer.teacher_model = torch.nn.Identity()
        trainer.teacher_model.forward = lambda **_: SimpleNamespace(logits=teacher)
        losses.append(
            trainer.compute_loss(
                lambda **_: SimpleNamespace(logits=student), batch, num_items_in_batch=torch.tensor(11)
            )
        )
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-7, atol=0)
    torch.testing.assert_close(*[torch.autograd.grad(loss, student)[0] for loss in losses], rtol=1e-6, atol=1e-10)
