"""TRG: the total from its terms, sampling, schedule, tokens of CNN and ViT, the method by name. Vectors: test_vectors.py."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdfast import methods
from kdfast.losses import kd_loss, token_context_loss, token_contrast_loss, token_graph_loss
from kdfast.methods import Context
from kdfast.methods.trg import gather_tokens, sample_tokens, tau_at, trg_loss, trg_relations

F64 = torch.float64


def tensors(seed=0):
    g = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=g, dtype=F64).requires_grad_()

    labels = torch.randint(5, (4,), generator=g)
    index = torch.stack([torch.randperm(9, generator=g)[:3] for _ in range(4)])
    return random(4, 5), random(4, 5), labels, random(4, 9, 6), random(4, 9, 7), index


def projection():
    torch.manual_seed(0)
    return nn.Linear(6, 7).double()


# ---------------------------------------------------------------- the total
def test_total_is_the_weighted_sum_of_the_printed_terms():
    zs, zt, labels, s, t, index = tensors()
    project = projection()
    weights = dict(alpha=2.0, beta=0.5, gamma=1.5)
    loss, parts = trg_loss(zs, zt, labels, s, t, project, index=index, k=4, tau=0.3, kd_weight=0.7, **weights)
    a, b = gather_tokens(s, index), gather_tokens(t, index)
    want = {
        "ce": F.cross_entropy(zs, labels),
        "kd": kd_loss(zs, zt, temperature=4.0),
        "inner": token_context_loss(s, t),
        "local": token_graph_loss(a, b, k=4),
        "global": token_contrast_loss(project(a), b, tau=0.3),
    }
    assert parts.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(parts[name], value.detach())
        assert value > 1e-4 and not parts[name].requires_grad
    total = want["ce"] + 0.7 * want["kd"] + 2.0 * want["inner"] + 0.5 * want["local"] + 1.5 * want["global"]
    torch.testing.assert_close(loss, total)
    leaves = (zs, s, project.weight, project.bias)
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), torch.autograd.grad(total, leaves))


def test_teacher_gets_no_gradient_and_student_first_is_an_option():
    zs, zt, labels, s, t, index = tensors()
    loss, parts = trg_loss(zs, zt, labels, s, t, projection(), index=index, kd_kind="reverse_kl")
    loss.backward()
    assert zt.grad is None and t.grad is None
    torch.testing.assert_close(parts["kd"], kd_loss(zs, zt, kind="reverse_kl").detach())


def test_a_weight_of_zero_leaves_its_term_out():
    *_, s, t, index = tensors()
    out = trg_relations(s, t, projection(), index=index, beta=0.0, gamma=0.0)
    assert out.parts.keys() == {"inner"}
    torch.testing.assert_close(out.loss, token_context_loss(s, t))
    assert trg_relations(s, t, projection(), index=index, alpha=0.0, beta=0.0, gamma=0.0).loss == 0


def test_sum_reduction_scales_the_node_terms_only():
    *_, s, t, index = tensors()
    mean = trg_relations(s, t, projection(), index=index).parts
    total = trg_relations(s, t, projection(), index=index, reduction="sum").parts
    torch.testing.assert_close(total["inner"], mean["inner"])
    for name in ("local", "global"):
        torch.testing.assert_close(total[name], 12 * mean[name])


# ---------------------------------------------------------------- sampling and schedule
def test_gather_is_image_major():
    tokens = torch.arange(12.0).reshape(2, 3, 2)
    assert gather_tokens(tokens, torch.tensor([[2, 0], [1, 2]])).tolist() == [[4, 5], [0, 1], [8, 9], [10, 11]]


def test_uniform_sampling_is_without_replacement_and_even():
    tokens = torch.zeros(4000, 6, 1)
    index = sample_tokens(tokens, 2, generator=torch.Generator().manual_seed(0))
    assert index.shape == (4000, 2) and bool((index[:, 0] != index[:, 1]).all())
    counts = index.flatten().bincount(minlength=6) / 8000
    assert bool(((counts - 1 / 6).abs() < 0.02).all())  # 4 standard deviations
    again = sample_tokens(tokens, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(index, again)


def test_sampling_by_score():
    tokens = torch.tensor([[[0.0], [3.0], [-9.0], [1.0]]])
    assert sample_tokens(tokens, 2, sampler="top").tolist() == [[2, 1]]
    score = torch.tensor([[1.0, 0.0, 0.0, 5.0]])
    assert sample_tokens(tokens, 2, sampler="top", score=score).tolist() == [[3, 0]]
    drawn = sample_tokens(tokens.expand(1000, 4, 1), 1, sampler="score", generator=torch.Generator().manual_seed(0))
    share = drawn.flatten().bincount(minlength=4) / 1000
    torch.testing.assert_close(share, torch.tensor([0, 3 / 13, 9 / 13, 1 / 13]), atol=0.06, rtol=0)
    assert sorted(sample_tokens(tokens, 4, sampler="score")[0].tolist()) == [0, 1, 2, 3]


def test_schedule():
    assert tau_at(0, 10) == 0.5 and tau_at(10, 10) == pytest.approx(0.1) and tau_at(5, 10) == pytest.approx(0.3)
    assert tau_at(None, 10) == 0.1 == tau_at(3, 0) and tau_at(99, 10) == pytest.approx(0.1)
    assert tau_at(2, 8, schedule="linear") == pytest.approx(0.4)
    taus = [tau_at(e, 20) for e in range(21)]
    assert taus == sorted(taus, reverse=True)


# ---------------------------------------------------------------- by name
class CNN(nn.Module):
    def __init__(self, width, grid=4):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(grid))
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


class ViT(nn.Module):
    """A class token and 4 x 4 patches; `body` returns the whole sequence."""

    def __init__(self, width):
        super().__init__()
        self.embed = nn.Conv2d(1, width, 2, stride=2)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.body = nn.TransformerEncoderLayer(width, 2, 2 * width, batch_first=True)
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        tokens = self.embed(x).flatten(2).mT
        return self.head(self.body(torch.cat((self.class_token.expand(len(x), -1, -1), tokens), 1))[:, 0])


@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("student, teacher", [("cnn", "cnn"), ("vit", "cnn"), ("cnn", "vit")])
def test_method_by_name_trains_student_and_projection(student, teacher, patch):
    pytest.importorskip("accelerate")
    from kdfast.train import Distiller

    torch.manual_seed(0)
    make = {"cnn": lambda width: CNN(width, grid=8), "vit": ViT}
    models = make[student](4), make[teacher](8)
    distiller = Distiller(
        *models, "trg", widths={"tokens": (4, 8)}, capture={"tokens": "body"}, options={"patch": patch, "k": 3, "samples": 4},
        progress=False,
    )  # fmt: skip
    x, y = torch.randn(6, 1, 8, 8), torch.arange(6)
    out = distiller.loss((x, y))
    assert out.parts.keys() == {"ce", "kd", "inner", "local", "global"}
    out.loss.backward()
    assert distiller.method.project.weight.shape == (8 * patch**2, 4 * patch**2)
    assert distiller.method.project.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in models[1].parameters())
    body = [p.grad for p in models[0].body.parameters()]
    assert all(g is not None and bool(g.isfinite().all()) for g in body) and any(g.abs().max() > 0 for g in body)


def test_grid_of_one_is_one_node_per_image():
    method = methods.load("trg")({"tokens": (3, 5)}, grid=1)
    s, t = torch.randn(4, 3, 6, 6), torch.randn(4, 5, 3, 3)
    tokens = method.tokens(s, t)
    assert [x.shape for x in tokens] == [(4, 1, 3), (4, 1, 5)]
    torch.testing.assert_close(tokens[0][:, 0], s.mean((2, 3)))


def test_experiment_runs_all_its_arms_and_goes_on_where_it_stopped(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("accelerate")
    from benchmarks.experiments.trg import ARMS, DATA, run
    from kdfast.data import load_task

    tasks = [dataclasses.replace(load_task(name), teacher_steps=2, eval_every=2) for name in DATA]
    out, work = tmp_path / "trg.json", tmp_path / "work"
    results = run(out, seeds=1, steps=2, tasks=tasks, work=work)
    assert results["data"].keys() == set(DATA) and json.loads(out.read_text()) == results
    for name in DATA:
        assert results["data"][name]["arms"].keys() == {"teacher", *(arm.name for arm in ARMS)}
    assert any("kd_trg" in sentence for sentence in results["sentences"])
    pieces = {path: path.stat().st_mtime_ns for path in work.glob("*/runs/*.json")}
    assert len(pieces) == 2 * (1 + len(ARMS))
    out.unlink()
    again = run(out, seeds=1, steps=2, tasks=tasks, work=work)  # from the finished pieces
    assert {path: path.stat().st_mtime_ns for path in pieces} == pieces
    assert again["sentences"] == results["sentences"]
    assert run(out, seeds=1, work=tmp_path / "nothing") == again  # the file alone is enough


def test_method_lowers_tau_along_the_run(monkeypatch):
    seen = []
    method = methods.load("trg")({"tokens": (3, 3)}, k=2, samples=4)
    monkeypatch.setattr("kdfast.methods.trg.trg_loss", lambda *_, tau, **__: seen.append(tau) or (torch.zeros(()), {}))
    feature = {"tokens": torch.randn(2, 3, 2, 2)}
    for step in (0, 5, 10):
        method(Context(None, None, torch.zeros(2), None, feature, feature, step=step, total_steps=10))
    assert seen == pytest.approx([0.5, 0.3, 0.1])


# ---------------------------------------------------------------- bad input
def test_bad_input():
    *_, s, t, index = tensors()
    with pytest.raises(ValueError, match=r"index: expected positions in \[0, 9\), got 0 to 9"):
        trg_relations(s, t, projection(), index=torch.tensor([[0, 9]] * 4))
    with pytest.raises(ValueError, match="index: expected each position once per image"):
        trg_relations(s, t, projection(), index=torch.tensor([[0, 0]] * 4))
    with pytest.raises(ValueError, match=r"index: expected \[B, r\] with B = 4"):
        trg_relations(s, t, projection(), index=index[:2])
    with pytest.raises(ValueError, match=r"teacher_tokens: expected \[B, M, D\] with the B and M of the student"):
        trg_relations(s, t[:, :8], projection(), index=index)
    with pytest.raises(ValueError, match="k: expected 1 to 11 neighbours among 12 tokens, got 12"):
        trg_relations(s, t, projection(), index=index, k=12)
    with pytest.raises(ValueError, match="count: expected 1 to 9 tokens per image, got 10"):
        sample_tokens(t, 10)
    with pytest.raises(ValueError, match="sampler: expected one of uniform, score, top"):
        sample_tokens(t, 3, sampler="random")
    with pytest.raises(ValueError, match="y: expected the width of x"):
        trg_relations(s, t, nn.Linear(6, 5).double(), index=index)
    with pytest.raises(ValueError, match="tau_end: expected a finite number"):
        methods.load("trg")({"tokens": (3, 3)}, tau_end=0.0)
