"""dho: the loss written out, stacked batches, the vote and its search against a loop, heads of both kinds. Vectors: test_vectors.py."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kdfast import methods
from kdfast.methods.dho import (
    ALPHAS,
    BETAS,
    VotingHeads,
    dho_loss,
    dual_head_probs,
    dual_head_search,
    text_classifier,
    vision_language_logits,
)
from kdfast.nn import DualOutput, dual_heads

F64 = torch.float64


def batch(rows=4, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ce, kd, t = (2 * torch.randn(rows, classes, generator=generator, dtype=F64) for _ in range(3))
    return ce.requires_grad_(), kd.requires_grad_(), torch.randint(classes, (rows,), generator=generator), t


def plain_kd(s, t, temperature=2.0):
    return (
        F.kl_div(F.log_softmax(s / temperature, -1), F.softmax(t / temperature, -1), reduction="batchmean")
        * temperature**2
    )


def test_the_terms_are_added_each_a_mean_over_its_own_rows():
    ce, kd, y, t = batch()
    _, kd_u, _, t_u = batch(7, seed=1)
    loss, parts = dho_loss(ce, kd, y, t, kd_u, t_u, ce_weight=0.3, kd_weight=0.7)
    want = 0.3 * F.cross_entropy(ce, y) + 0.7 * (plain_kd(kd, t) + plain_kd(kd_u, t_u))
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(
        torch.autograd.grad(loss, (ce, kd, kd_u), retain_graph=True), torch.autograd.grad(want, (ce, kd, kd_u))
    )
    torch.testing.assert_close(parts["kd_unlabeled"], plain_kd(kd_u, t_u).detach())


def test_stacked_rows_without_a_label_are_the_unlabelled_batch():
    ce, kd, y, t = batch(6)
    y[[1, 4]] = -100
    on = y != -100
    got = dho_loss(ce, kd, y, t)
    want = dho_loss(ce[on], kd[on], y[on], t[on], kd[~on], t[~on])
    torch.testing.assert_close(got.loss, want.loss)
    (grad,) = torch.autograd.grad(got.loss, ce)
    assert not grad[~on].any() and grad[on].all()  # the head of the labels never sees the others


def test_no_unlabelled_rows_skip_their_term():
    ce, kd, y, t = batch()
    want = dho_loss(ce, kd, y, t)
    got = dho_loss(ce, kd, y, t, kd[:0], t[:0])
    assert got.parts["kd_unlabeled"] == 0 and torch.equal(got.loss, want.loss)


def test_probabilities_are_mixed_not_logits():
    ce, kd, _, _ = batch()
    got = dual_head_probs(ce, kd, alpha=0.25, beta=2.0)
    torch.testing.assert_close(got, 0.25 * F.softmax(ce, -1) + 0.75 * F.softmax(kd / 2, -1))
    torch.testing.assert_close(got.sum(-1), torch.ones(4, dtype=F64))


def test_search_is_the_double_loop_that_keeps_strict_improvements():
    ties = 0
    for seed in range(8):
        ce, kd, y, _ = batch(9, 4, seed)
        best = (0.0, 0.0, 1.0)  # count, alpha, beta
        counts = []
        for beta in BETAS:
            for alpha in ALPHAS:
                right = int((dual_head_probs(ce, kd, alpha=alpha, beta=beta).argmax(-1) == y).sum())
                counts.append(right)
                if right > best[0]:
                    best = (right, alpha, beta)
        ties += counts.count(max(counts)) > 1
        assert dual_head_search(ce, kd, y, chunk=4) == (best[1], best[2], pytest.approx(100 * best[0] / 9))
        y[0] = -100
        assert dual_head_search(ce, kd, y) == dual_head_search(ce[1:], kd[1:], y[1:])
    assert ties > 4  # the first of equal pairs was asked for
    never = torch.zeros(2, 3)
    assert dual_head_search(never, never, torch.tensor([2, 1])) == (0.0, 1.0, 0.0)


def test_bad_input():
    ce, kd, y, t = batch()
    for arguments, options, message in (
        ((ce[:0], kd[:0], y[:0], t[:0]), {}, "at least one labelled row"),
        ((ce, kd, y, t[:, :3]), {}, "teacher: expected logits of shape"),
        ((ce, kd, y, t, kd), {}, "expected both or neither"),
        ((ce, kd, y, t, kd, t[:2]), {}, "teacher_unlabeled: expected"),
        ((ce, kd, y + 5, t), {}, r"labels: expected integers in \[0, 5\)"),
        ((ce, kd, y, t), {"temperature": 0.0}, "temperature: expected"),
        ((ce, kd, y, t), {"ce_weight": -1.0}, "ce_weight: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            dho_loss(*arguments, **options)
    for options in ({"alpha": 1.5}, {"beta": 0.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            dual_head_probs(ce, kd, **options)
    for options, message in (
        ({"alphas": ()}, "empty grid"),
        ({"betas": (1.0, 0.0)}, "beta: expected"),
        ({"alphas": (2.0,)}, "alpha"),
    ):
        with pytest.raises(ValueError, match=message):
            dual_head_search(ce, kd, y, **options)
    with pytest.raises(ValueError, match="at least one labelled row"):
        dual_head_search(ce[:0], kd[:0], y[:0])
    for options in ({"heads": 3}, {"search": "test"}, {"alpha": 2.0}, {"beta": 0.0}, {"kd_weight": -1.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            methods.load("dho")(**options)


def test_the_teacher_gets_no_gradient_though_it_asks_for_one():
    ce, kd, y, t = batch()
    t.requires_grad_()
    assert torch.autograd.grad(dho_loss(ce, kd, y, t, kd, t).loss, t, allow_unused=True) == (None,)


# ---------------------------------------------------------------- heads
def test_heads_of_a_clip_style_student():
    torch.manual_seed(0)
    head = VotingHeads(nn.Linear(6, 3), normalize=True, scale=100.0)
    f = torch.randn(4, 6)
    f[3] = 0
    ce, kd = head(f)
    torch.testing.assert_close(ce, F.linear(f, head.main.weight, head.main.bias))
    direction = f / f.norm(dim=1, keepdim=True).clamp_min(1e-12)
    torch.testing.assert_close(kd, 100 * (direction @ head.aux.weight.T + head.aux.bias))
    assert kd.isfinite().all()
    text = torch.randn(3, 2, 6)
    head.init_from_text(text)
    for one in (head.main, head.aux):
        torch.testing.assert_close(one.weight.data, (text[:, 0] + text[:, 1]) / 2)
        assert not one.bias.any()


def test_evaluation_is_the_log_of_the_vote():
    torch.manual_seed(0)
    head = VotingHeads(nn.Linear(6, 3), alpha=0.25, beta=2.0)
    f = torch.randn(4, 6)
    out = head(f)
    assert isinstance(out, DualOutput)
    torch.testing.assert_close(head.eval()(f).exp(), dual_head_probs(*out, alpha=0.25, beta=2.0))


def test_a_vision_language_teacher():
    text, images = torch.randn(3, 4, 6), torch.randn(5, 6)
    w = text_classifier(text)
    mean = (text / text.norm(dim=-1, keepdim=True)).mean(1)
    torch.testing.assert_close(w, mean / mean.norm(dim=-1, keepdim=True))
    torch.testing.assert_close(
        vision_language_logits(images, w), 100 * F.cosine_similarity(images[:, None], w[None], dim=-1)
    )


def test_by_name_searches_on_validation_and_saves_both_heads(tmp_path):
    pytest.importorskip("accelerate")
    from kdfast.train import Distiller

    torch.manual_seed(0)
    student, teacher = (nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(2))
    run = Distiller(student, teacher, "dho", options={"search": "end"}, progress=False, out=tmp_path)
    x = torch.randn(60, 3)
    y = teacher(x).argmax(-1)
    mixed = torch.where(torch.arange(60) < 20, y, -100)
    run.fit(DataLoader(TensorDataset(x, mixed), 20, shuffle=True), 2)
    (head,) = dual_heads(run.student)
    assert (head.alpha.item(), head.beta.item()) == (0.5, 0.5) and run.student.training
    model = run.deploy(DataLoader(TensorDataset(x, y), 25))
    run.student.eval()
    head.both = True
    alpha, beta, percent = dual_head_search(*run.student(x), y)
    head.both = False
    assert (head.alpha.item(), head.beta.item()) == (pytest.approx(alpha), pytest.approx(beta))
    right = (model(x).argmax(-1) == y).double().mean().item()
    assert 100 * right == pytest.approx(percent) and percent > 0
    assert {"2.main.weight", "2.aux.weight", "2.alpha", "2.beta"} <= set(model.state_dict())
    assert not math.isnan(run.history.rows[-1]["kd_unlabeled"])


def test_by_name_the_best_epoch_is_kept_with_its_pair(tmp_path):
    pytest.importorskip("accelerate")
    from kdfast.train import Distiller

    def run_to(epochs, **changes):
        torch.manual_seed(0)
        student, teacher = (nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(2))
        run = Distiller(
            student, teacher, "dho", progress=False, log_every=1, optimizer=lambda p: torch.optim.SGD(p, 3.0), **changes
        )
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(60, 3, generator=generator)
        y = teacher(x).argmax(-1)
        states, original = [], run.method.after_epoch
        run.method.after_epoch = lambda setup: (original(setup), states.append(
            {name: value.clone() for name, value in setup.student.state_dict().items()}))  # fmt: skip
        val = DataLoader(TensorDataset(x[:24], y[:24]), 25)
        run.fit(DataLoader(TensorDataset(x, y), 20, shuffle=True), epochs, eval_loader=val, resume=True)
        return run, states, [row["eval_accuracy"] for row in run.history.rows if "eval_accuracy" in row], val

    run, states, accuracies, val = run_to(6)
    best = accuracies.index(max(accuracies))
    assert 0 < best < 5 or accuracies[best] > min(accuracies)  # there was something to choose
    model = run.deploy(val)
    assert all(torch.equal(value, states[best][name]) for name, value in model.state_dict().items())
    assert run.evaluate(val, model)["accuracy"] == pytest.approx(max(accuracies))
    assert run.method.best.score.item() == pytest.approx(100 * max(accuracies))
    run_to(3, out=tmp_path)
    resumed, *_ = run_to(6, out=tmp_path)  # what was best before the stop is known after it
    assert resumed.method.best.score == run.method.best.score
    again = resumed.deploy(val).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())
