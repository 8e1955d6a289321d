"""KD with data pruning: the loss, the ridge solutions and the argument they make, the part a run by name takes, the experiment."""

import json

import pytest
import torch
import torch.nn.functional as F

from kdfast import methods
from kdfast.methods.kd_data_pruning import pruned_kd_loss, ridge_student

F64 = torch.float64


def example():
    generator = torch.Generator().manual_seed(0)
    s, t = (3 * torch.randn(6, 4, generator=generator, dtype=F64) for _ in range(2))
    return s.requires_grad_(), t, torch.tensor([0, 3, 2, 1, 0, 2])


@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0])
def test_loss_is_the_convex_sum(alpha):
    s, t, y = example()
    loss, parts = pruned_kd_loss(s, t, y, alpha=alpha, temperature=3.0)
    kd = 9 * F.kl_div((s / 3).log_softmax(-1), (t / 3).softmax(-1), reduction="batchmean")
    want = (1 - alpha) * F.cross_entropy(s, y) + alpha * kd
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(torch.autograd.grad(loss, s), torch.autograd.grad(want, s))
    torch.testing.assert_close(parts["kd"], kd.detach())


def test_ignored_labels_leave_both_terms():
    s, t, y = example()
    y[2:4] = -100
    keep = y != -100
    torch.testing.assert_close(pruned_kd_loss(s, t, y).loss, pruned_kd_loss(s[keep], t[keep], y[keep]).loss)


@pytest.mark.parametrize("change", [{"alpha": 1.1}, {"alpha": -0.1}, {"temperature": 0.0}])
def test_bad_options(change):
    s, t, y = example()
    with pytest.raises(ValueError, match=f"{next(iter(change))}: expected a finite number in"):
        pruned_kd_loss(s, t, y, **change)
    with pytest.raises(ValueError, match=next(iter(change))):
        methods.load("kd_data_pruning")(**change)


def test_teacher_of_another_width_is_refused():
    s, _, y = example()
    with pytest.raises(ValueError, match="teacher"):
        pruned_kd_loss(s, torch.zeros(6, 5), y)


# ---------------------------------------------------------------- ridge regression
def data(noise=0.5):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 30, generator=generator, dtype=F64)
    truth = torch.randn(5, generator=generator, dtype=F64)
    return x, x.T @ truth + noise * torch.randn(30, generator=generator, dtype=F64), truth


def test_ridge_solutions_minimise_their_objectives():
    x, y, _ = data()
    keep = torch.tensor([1, 4, 7, 20, 29, 11])
    teacher, student = ridge_student(x, y, keep, 0.3, 0.8)
    for weights, columns, target in (
        (teacher, x, y),
        (student, x[:, keep], 0.8 * x[:, keep].T @ teacher + 0.2 * y[keep]),
    ):
        w = weights.clone().requires_grad_()
        objective = (columns.T @ w - target).square().sum() + 0.3 * w.square().sum()
        (grad,) = torch.autograd.grad(objective, w)
        torch.testing.assert_close(grad, torch.zeros(5, dtype=F64), atol=1e-10, rtol=0)
    torch.testing.assert_close(ridge_student(x, y, list(range(30)), 0.3, 0.0)[1], teacher)


def test_without_noise_and_penalty_everything_is_the_truth():
    x, y, truth = data(noise=0.0)
    for alpha in (0.0, 1.0):
        for weights in ridge_student(x, y, range(10), 0.0, alpha):
            torch.testing.assert_close(weights, truth)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lam": -1.0}, "lam: expected a finite number in"),
        ({"lam": 0.0, "keep": [0, 1]}, "lam: 0 with a singular Gram matrix has no solution"),
        ({"alpha": 2.0}, "alpha: expected a finite number in"),
        ({"keep": [0, 0, 1]}, "keep: expected each sample at most once"),
        ({"keep": [0, 30]}, r"keep: expected values in \[0, 30\), got 0 to 30"),
        ({"y": torch.zeros(29)}, r"x, y: expected \[D, n\] and \[n\]"),
    ],
    ids=str,
)
def test_bad_ridge(change, message):
    x, y, _ = data()
    given = {"x": x, "y": y, "keep": [0, 1, 2, 3, 4, 5], "lam": 1.0, "alpha": 0.5} | change
    with pytest.raises(ValueError, match=message):
        ridge_student(**given)


# ---------------------------------------------------------------- by name
def test_the_part_is_chosen_once_for_a_seed():
    from kdfast.data import Rows

    rows = Rows(torch.arange(50).float().unsqueeze(1), torch.arange(50) % 5)
    method = methods.load("kd_data_pruning")(keep=0.2)
    first, again, other = method.choose(rows, 0), method.choose(rows, 0), method.choose(rows, 1)
    assert first.indices == again.indices != other.indices and len(first) == 10
    inputs, labels = first.__getitems__([0, 3])
    assert inputs.flatten().tolist() == [first.indices[0], first.indices[3]] and (inputs.flatten() % 5 == labels).all()
    even = methods.load("kd_data_pruning")(keep=0.2, stratify=True).choose(rows, 0)
    assert torch.tensor([i % 5 for i in even.indices]).bincount().tolist() == [2] * 5
    hard = methods.load("kd_data_pruning")(keep=0.1, mode="hard", scores=list(range(50))).choose(rows, 0)
    assert hard.indices == [45, 46, 47, 48, 49]


def test_a_run_by_name_trains_on_the_part_and_its_baselines_on_everything(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("accelerate")
    from kdfast import experiment

    seen = []
    original = experiment.Distiller.fit

    def fit(self, loader, *rest, **options):
        seen.append(len(loader.dataset))
        return original(self, loader, *rest, **options)

    experiment.Distiller.fit = fit
    try:
        experiment.run("relabelled_digits", "kd_data_pruning", seeds=1, steps=4, out=tmp_path, options={"keep": 0.1})
    finally:
        experiment.Distiller.fit = original
    assert seen == [900, 900, 900, 90]


def test_a_fifth_of_the_labels_is_drawn_anew():
    pytest.importorskip("sklearn")
    from kdfast.data.digits import digit_splits
    from kdfast.data.relabelled_digits import relabelled_splits

    clean, noisy = digit_splits(0), relabelled_splits(0)
    wrong = clean["teacher"].tensors[1] != noisy["student"].tensors[1]
    part = methods.load("kd_data_pruning")(keep=0.2).choose(noisy["student"], 0)
    assert 0.1 < wrong[part.indices].float().mean() < 0.3  # a random part has the noise of the whole
    assert 130 < wrong.sum() <= 180 and torch.equal(clean["test"].tensors[1], noisy["test"].tensors[1])


def test_experiment_runs_resumes_and_chooses_alpha_on_validation(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("accelerate")
    from benchmarks.experiments import kd_data_pruning as experiment

    out, options = tmp_path / "pruning.json", {"seeds": 1, "steps": 6, "shares": (0.1, 1.0), "alphas": (0.0, 1.0)}
    results = experiment.run(out, work=tmp_path / "work", **options)
    assert len(results["scores"]) == 12 and len(results["sentences"]) == 1 + 2 * 5 + 4
    for selector, chosen in results["best"].items():
        for share, alpha in chosen.items():
            val = {a: results["scores"][f"{selector} {share} {a:g}"]["val"][0] for a in (0.0, 1.0)}
            assert val[alpha] == max(val.values())
    parts = {results["scores"][f"{name} 0.1 1"]["test"][0] for name in experiment.SELECTORS}
    assert len(parts) > 1 and results["scores"]["random 1 1"] == results["scores"]["el2n 1 1"]
    assert experiment.run(out, work=tmp_path / "none", **options) == json.loads(out.read_text())


def test_the_ridge_simulation_shows_the_argument():
    pytest.importorskip("sklearn")
    pytest.importorskip("accelerate")
    from benchmarks.experiments.kd_data_pruning import ridge_simulation

    found = ridge_simulation(trials=100)
    assert found["bias"]["200"] < found["bias"]["120"] < found["bias"]["40"]
    assert found["error"]["1"] < found["error"]["0"]
