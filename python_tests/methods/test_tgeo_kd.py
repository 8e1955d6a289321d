"""tgeo_kd: the hypergradient against central differences, gradients of both levels, states by hand, by name. Vectors: test_vectors.py."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

from kdfast import methods
from kdfast.methods.tgeo_kd import (
    FusionRatioNet,
    converged,
    one_step_hypergradient,
    state_width,
    trilateral_state,
    weighted_kd_ce,
)

F64 = torch.float64


def logits(rows=5, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    s, t = (2 * torch.randn(rows, classes, generator=generator, dtype=F64) for _ in range(2))
    alpha = torch.rand(rows, generator=generator, dtype=F64)
    return s.requires_grad_(), t, torch.randint(classes, (rows,), generator=generator), alpha.requires_grad_()


# ---------------------------------------------------------------- lower level
def test_gradient_of_the_lower_level_written_out():
    s, t, y, alpha = logits()
    loss = weighted_kd_ce(s, t, y, alpha, temperature=2.0).loss
    p, q, one = F.softmax(s / 2, -1), F.softmax(t / 2, -1), F.one_hot(y, 4)
    a = alpha.unsqueeze(1)
    want = (a * 2 * (p - q) + (1 - a) * (F.softmax(s, -1) - one)) / 5
    grad_s, grad_a = torch.autograd.grad(loss, (s, alpha))
    torch.testing.assert_close(grad_s, want.detach())
    kd = (q * (q / p).log()).sum(-1)
    torch.testing.assert_close(grad_a, ((4 * kd - F.cross_entropy(s, y, reduction="none")) / 5).detach())


def test_released_cross_entropy_and_ignored_rows():
    s, t, y, alpha = logits()
    got = weighted_kd_ce(s, t, y, torch.zeros_like(alpha), ce_on="probs").loss
    torch.testing.assert_close(got, F.cross_entropy(F.softmax(s, -1), y))
    y[2] = -100
    kept = [0, 1, 3, 4]
    got, want = weighted_kd_ce(s, t, y, alpha), weighted_kd_ce(s[kept], t[kept], y[kept], alpha[kept])
    torch.testing.assert_close(got.loss, want.loss)
    torch.testing.assert_close(got.parts, want.parts)


def test_probabilities_in_place_of_logits_are_noticed():
    s, t, y, alpha = logits()
    with pytest.warns(UserWarning, match="teacher: expected logits, got rows of probabilities"):
        weighted_kd_ce(s, F.softmax(t, -1), y, alpha)


# ---------------------------------------------------------------- upper level
def problem(hidden):
    torch.manual_seed(0)
    layers = [nn.Linear(6, 4)] if hidden is None else [nn.Linear(6, hidden), nn.Tanh(), nn.Linear(hidden, 4)]
    model = nn.Sequential(*layers).double()
    x, x_val = torch.randn(5, 6, dtype=F64), torch.randn(7, 6, dtype=F64)
    _, t, y, alpha = logits()
    y_val = torch.randint(4, (7,), generator=torch.Generator().manual_seed(1))

    def forward(parameters, batch):
        return functional_call(model, parameters, (batch,))

    return forward, dict(model.named_parameters()), x, t, y, alpha.detach(), x_val, y_val


@pytest.mark.parametrize("hidden", [None, 8])
@pytest.mark.parametrize("ce_on", ["logits", "probs"])
def test_hypergradient_is_the_central_difference_of_the_validation_loss(hidden, ce_on):
    forward, theta, x, t, y, alpha, x_val, y_val = problem(hidden)
    y[1] = -100
    options = {"temperature": 2.0, "ce_on": ce_on}

    def upper(weights):
        lower = weighted_kd_ce(forward(theta, x), t, y, weights, **options).loss
        slopes = torch.autograd.grad(lower, list(theta.values()))
        stepped = {name: p - 0.3 * g for (name, p), g in zip(theta.items(), slopes)}
        scores = forward(stepped, x_val)
        return F.cross_entropy(scores if ce_on == "logits" else F.softmax(scores, -1), y_val).item()

    got = one_step_hypergradient(forward, theta, x, t, y, alpha, x_val, y_val, eta=0.3, **options)
    small = 1e-5
    want = [(upper(alpha + small * e) - upper(alpha - small * e)) / (2 * small) for e in torch.eye(5, dtype=F64)]
    torch.testing.assert_close(got, torch.tensor(want, dtype=F64), rtol=1e-6, atol=1e-9)
    assert got[1] == 0 and got[[0, 2, 3, 4]].abs().min() > 1e-5
    two = one_step_hypergradient(
        forward, theta, x, t, y, alpha, x_val, y_val, eta=0.3, product="finite_difference", **options
    )
    torch.testing.assert_close(two, got, rtol=1e-4, atol=1e-7)
    assert all(p.grad is None for p in theta.values())


def test_hypergradient_bad_input():
    forward, theta, x, t, y, alpha, x_val, y_val = problem(None)
    with pytest.raises(ValueError, match="parameters: expected a student with parameters"):
        one_step_hypergradient(forward, {}, x, t, y, alpha, x_val, y_val, eta=0.1)
    with pytest.raises(ValueError, match="val_labels: expected at least one"):
        one_step_hypergradient(forward, theta, x, t, y, alpha, x_val[:0], y_val[:0], eta=0.1)
    with pytest.raises(ValueError, match="product: expected one of"):
        one_step_hypergradient(forward, theta, x, t, y, alpha, x_val, y_val, eta=0.1, product="loop")


# ---------------------------------------------------------------- state and network
def test_states_by_hand_and_without_gradient():
    s = torch.tensor([[0.2, 0.8]], requires_grad=True)
    t, o, y = torch.tensor([[0.6, 0.4]]), torch.tensor([[0.5, 0.5]]), torch.tensor([1])
    probs = [0.2, 0.8, 0.6, 0.4, 0.0, 1.0, 0.5, 0.5]
    edges = [0.09, 0.09, 0.04, 0.04, 0.16, 0.16]
    angles = [0.3 * -0.2, -0.3 * 0.2, 0.4 * -0.2, -0.4 * 0.2]
    want = {
        "probs": probs, "edges": edges, "angles": angles, "full": [*probs, *edges, 0.36, 0.36, 0.25, 0.25],
        "angles+probs": angles + probs,
    }  # fmt: skip
    for state, numbers in want.items():
        got = trilateral_state(s, t, y, o, state=state)
        torch.testing.assert_close(got, torch.tensor([numbers]))
        assert not got.requires_grad and state_width(state, 2) == len(numbers)
    with pytest.raises(ValueError, match="state: expected one of"):
        trilateral_state(s, t, y, o, state="probs+corners")
    with pytest.raises(ValueError, match="expected one shape"):
        trilateral_state(s, t[:, :1], y, o)


def test_network_keeps_the_batch_axis():
    net = FusionRatioNet(8, hidden=(128,), negative_slope=0.0)
    assert [m.out_features for m in net if isinstance(m, nn.Linear)] == [128, 1]
    assert net(torch.randn(1, 8)).shape == (1,) and ((net(torch.randn(9, 8)) - 0.5).abs() < 0.5).all()
    with pytest.raises(ValueError, match=r"state: expected \[B, 8\], got \(2, 9\)"):
        net(torch.randn(2, 9))


def test_bad_input():
    s, t, y, alpha = logits()
    for arguments, options, message in (
        ((s, t[:, :3], y, alpha), {}, "teacher: expected logits"),
        ((s, t, y, alpha[:3]), {}, "alpha: expected shape"),
        ((s, t, y, alpha.unsqueeze(1)), {}, "alpha: expected shape"),
        ((s, t, y, alpha + 1), {}, r"alpha: expected numbers in \[0, 1\]"),
        ((s, t, y + 4, alpha), {}, r"labels: expected integers in \[0, 4\)"),
        ((s, t, y, alpha), {"temperature": 0.0}, "temperature: expected"),
        ((s, t, y, alpha), {"ce_on": "both"}, "ce_on: expected one of"),
    ):
        with pytest.raises(ValueError, match=message):
            weighted_kd_ce(*arguments, **options)
    for options in (
        {"controller_update": "joint"},
        {"state": "all"},
        {"product": "loop"},
        {"temperature": 0.0},
        {"every": 0},
    ):
        with pytest.raises(ValueError, match=next(iter(options))):
            methods.load("tgeo_kd")(num_classes=4, **options)


def test_the_published_stop():
    falling = [1 / (i + 1) for i in range(30)]
    assert not converged(falling) and converged([*falling, *[0.5] * 11]) and not converged([0.5] * 10)


# ---------------------------------------------------------------- by name
def distiller(**options):
    from kdfast.train import Distiller

    torch.manual_seed(0)
    student, teacher = (nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(2))
    return Distiller(student, teacher, "tgeo_kd", options={"num_classes": 4} | options, progress=False)


def data(rows=40):
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(rows, 3, generator=generator), torch.arange(rows) % 4)


def test_by_name_the_network_learns_from_validation_and_the_student_not_from_it():
    pytest.importorskip("accelerate")
    train, val = DataLoader(data(), 10), DataLoader(data(20), 10)
    run = distiller(eta=0.5)
    run.fit(train, 1, eval_loader=val)
    x, y = data().tensors
    probs = torch.softmax(run.teacher(x), -1)
    want = torch.stack([probs[y == c].mean(0) for c in range(4)])
    torch.testing.assert_close(run.method.class_means, want.detach())

    batch, parameters = (x[:10], y[:10]), list(run.method.controller.parameters())
    run.net.train()
    statistics = run.student[1].running_mean.clone()
    loss, parts = run.loss(batch)
    assert not torch.equal(run.student[1].running_mean, statistics)  # by the one forward pass in training mode
    assert run.student.training and set(parts) == {"ce", "kd", "alpha"}
    grads = torch.autograd.grad(loss, parameters, retain_graph=True)
    assert any(g.abs().max() > 0 for g in grads)
    student = torch.autograd.grad(loss, list(run.student.parameters()))
    run.method.update, run.method.upper = "none", None
    statistics = run.student[1].running_mean.clone()
    plain, _ = run.loss(batch)
    torch.testing.assert_close(loss, plain)  # the pull on the network adds nothing to the loss
    torch.testing.assert_close(student, torch.autograd.grad(plain, list(run.student.parameters()), retain_graph=True))
    assert torch.autograd.grad(plain, parameters, allow_unused=True) == (None,) * len(parameters)


def test_by_name_what_is_missing_is_said():
    pytest.importorskip("accelerate")
    x, y = data().tensors
    run = distiller()
    with pytest.raises(ValueError, match="class_means: not there yet"):
        run.loss((x[:8], y[:8]))
    with pytest.raises(ValueError, match="eval_loader: the small network learns from validation batches"):
        run.fit(DataLoader(data(), 10), 1)
    few = TensorDataset(x[y != 2], y[y != 2])
    run = distiller(controller_update="none")
    before = [p.clone() for p in run.method.controller.parameters()]
    run.fit(DataLoader(few, 10), 1)  # class 2 never occurs: nothing to say
    assert run.method.upper is None and run.method.class_means[2].isnan().all()
    moved = [not torch.equal(a, b) for a, b in zip(before, run.method.controller.parameters())]
    assert not any(moved)  # as released: it stays as it was drawn
    with pytest.raises(ValueError, match="labels: no training sample of class 2, so it has no mean"):
        run.loss((x[:8], y[:8]))
