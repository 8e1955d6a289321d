"""dhkd: closed forms, clamp, projection, the aligned gradient through a network, heads that come and go. Vectors: test_vectors.py."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kdfast import methods
from kdfast.methods.dhkd import (
    align_gradients,
    aligned_loss,
    binary_kl_loss,
    binary_kl_norm_loss,
    dhkd_loss,
    graph_leaves,
)
from kdfast.nn import DualHead, DualOutput, dual_heads, remove_dual_heads, replace_head

F64 = torch.float64


def logits(rows=4, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    a, t = (3 * torch.randn(rows, classes, generator=generator, dtype=F64) for _ in range(2))
    return a.requires_grad_(), t, torch.randint(classes, (rows,), generator=generator)


# ---------------------------------------------------------------- losses
@pytest.mark.parametrize("clamp", [1e-8, None])
def test_closed_forms_and_gradients(clamp):
    a, t, _ = logits()
    norm = binary_kl_norm_loss(a, t, temperature=2.0, clamp_eps=clamp)
    torch.testing.assert_close(norm, ((a - t) / 4).cosh().log().sum() * 4 / 4)
    torch.testing.assert_close(torch.autograd.grad(norm, a)[0], (2 / 8 * torch.tanh((a - t) / 4)).detach())
    plain = binary_kl_loss(a, t, temperature=2.0, clamp_eps=clamp)
    u, v = torch.sigmoid(a / 2), torch.sigmoid(t / 2)
    torch.testing.assert_close(plain, (v * (v / u).log() + (1 - v) * ((1 - v) / (1 - u)).log()).sum() * 4 / 4)
    torch.testing.assert_close(torch.autograd.grad(plain, a)[0], (2 / 4 * (u - v)).detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64])
def test_beyond_the_clamp_the_term_is_constant_and_its_gradient_zero_in_every_dtype(dtype):
    bound = math.log((1 - 1e-8) / 1e-8)  # 18.42
    a = torch.tensor([[36.0, 37.5, -500.0]], dtype=dtype, requires_grad=True)  # 18, 18.75, -250 at T = 2
    t = torch.zeros(1, 3, dtype=dtype)
    rows = binary_kl_norm_loss(a, t)
    want = 4 * (math.log(math.cosh(9.0)) + 2 * math.log(math.cosh(bound / 2)))
    assert rows.item() == pytest.approx(want, rel=1e-6)
    (grad,) = torch.autograd.grad(rows, a)
    assert grad[0, 0] > 0 and not grad[0, 1:].any()
    (free,) = torch.autograd.grad(binary_kl_norm_loss(a, t, clamp_eps=None), a)
    torch.testing.assert_close(free.float(), torch.tensor([[1.0, 1.0, -1.0]]))
    (plain,) = torch.autograd.grad(binary_kl_loss(a, t), a)
    assert plain[0, 0] > 0 and not plain[0, 1:].any()


def test_small_differences_keep_their_digits_in_float32():
    a, t = torch.full((1, 1), 1e-3), torch.zeros(1, 1)
    want = 4 * math.log(math.cosh(1e-3 / 4))
    assert binary_kl_norm_loss(a, t).item() == pytest.approx(
        want, rel=1e-4
    )  # 1.2e-7: eager log-sigmoid has no digit left


def test_mask_and_reductions():
    a, t, _ = logits()
    mask = torch.tensor([True, False, True, True])
    for loss in (binary_kl_norm_loss, binary_kl_loss):
        rows = loss(a, t, reduction="none")
        torch.testing.assert_close(loss(a, t, mask=mask), rows[mask].mean())
        torch.testing.assert_close(loss(a, t, reduction="sum"), rows.sum())


def test_bad_input():
    a, t, y = logits()
    for arguments, options, message in (
        ((a, t[:, :3]), {}, "of one shape"),
        ((a[None], t[None]), {}, "flatten other axes"),
        ((a[:0], t[:0]), {}, "N > 0"),
        ((a, t), {"temperature": 0.0}, "temperature: expected"),
        ((a, t), {"clamp_eps": 0.5}, "clamp_eps: expected None or a number in"),
    ):
        with pytest.raises(ValueError, match=message):
            binary_kl_norm_loss(*arguments, **options)
        with pytest.raises(ValueError, match=message):
            binary_kl_loss(*arguments, **options)
    for change, message in (
        ({"alpha": -1.0}, "alpha"),
        ({"gamma": -1.0}, "gamma"),
        ({"loss": "kl"}, "loss: expected one of"),
    ):
        with pytest.raises(ValueError, match=message):
            dhkd_loss(a, a, t, y, **change)
    with pytest.raises(ValueError, match="other: expected a loss that reaches a parameter"):
        aligned_loss(a.sum(), t.sum())
    with pytest.raises(ValueError, match="task: expected a loss that reaches a parameter"):
        aligned_loss(t.sum(), a.sum())


# ---------------------------------------------------------------- alignment
def test_projection_leaves_no_opposition_and_never_changes_the_task():
    generator = torch.Generator().manual_seed(1)
    seen = set()
    for _ in range(20):
        g1, g2 = ([torch.randn(3, generator=generator), None, torch.randn(2, generator=generator)] for _ in range(2))
        g1[1] = torch.randn(4, generator=generator)  # a task head that the other loss does not touch
        merged, dot = align_gradients(g1, g2)
        flat = torch.cat(g1)
        assert (torch.cat(merged) @ flat) >= flat.square().sum() * (1 - 1e-5)
        if dot >= 0:
            torch.testing.assert_close(merged[0], g1[0] + g2[0])
            assert torch.equal(merged[1], g1[1])
        else:
            torch.testing.assert_close(merged[1], g1[1] * (1 - dot / flat.square().sum()))
        seen.add(bool(dot < 0))
    assert seen == {True, False}


def test_no_task_gradient_is_a_plain_sum_and_none_stays_none():
    merged, dot = align_gradients([torch.zeros(2), None, None], [torch.ones(2), torch.ones(1), None])
    assert dot == 0 and merged[0].tolist() == [1, 1] and merged[1].tolist() == [1] and merged[2] is None
    with pytest.raises(ValueError):
        align_gradients([None], [])


def network(seed=0):
    torch.manual_seed(seed)
    return replace_head(nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4)), DualHead).double()


def test_backward_of_the_aligned_loss_is_the_projected_gradient():
    x, y = torch.randn(8, 3, dtype=F64), torch.arange(8) % 4
    conflicts = 0
    for seed in range(6):
        model = network(seed)
        t = 4 * torch.randn(8, 4, dtype=F64, generator=torch.Generator().manual_seed(seed))
        out, params = model(x), list(model.parameters())
        g1 = torch.autograd.grad(F.cross_entropy(out.main, y), params, retain_graph=True, allow_unused=True)
        g2 = torch.autograd.grad(0.5 * binary_kl_norm_loss(out.aux, t), params, retain_graph=True, allow_unused=True)
        want, dot = align_gradients(g1, g2)
        loss, parts = dhkd_loss(*out, t, y, alpha=0.5, align=True)
        assert parts["conflict"] == (dot < 0)
        conflicts += int(dot < 0)
        (3 * loss).backward()
        for parameter, gradient in zip(params, want):
            torch.testing.assert_close(parameter.grad, 3 * gradient)
        torch.testing.assert_close(loss, dhkd_loss(*out, t, y, alpha=0.5).loss)
    assert conflicts > 0


def test_leaves_are_found_once():
    model = network()
    out = model(torch.randn(2, 3, dtype=F64))
    found = graph_leaves(out.main.sum() + out.aux.sum() + out.main.mean())
    assert {id(leaf) for leaf in found} == {id(p) for p in model.parameters()} and len(found) == 6
    assert graph_leaves(torch.zeros(1)) == []


# ---------------------------------------------------------------- heads, by name
def test_heads_come_and_go_without_a_bit_of_difference():
    plain = nn.Sequential(nn.Linear(3, 6), nn.Sequential(nn.ReLU(), nn.Linear(6, 4)))
    x = torch.randn(5, 3)
    want = plain(x)
    dual = replace_head(plain, lambda head: DualHead(head, aux="nonlinear"))
    assert isinstance(dual(x), DualOutput) and torch.equal(dual(x).main, want) and len(dual_heads(dual)) == 1
    dual.eval()
    assert torch.equal(dual(x), want)
    dual_heads(dual)[0].both = True
    assert torch.equal(dual(x).main, want)
    back = remove_dual_heads(dual)
    assert torch.equal(back(x), want) and dual_heads(back) == [] and len(list(back.parameters())) == 4
    with pytest.raises(ValueError, match="aux: expected one of linear, nonlinear"):
        DualHead(nn.Linear(2, 2), aux="deep")


def test_ignored_labels_leave_both_terms():
    a, t, y = logits()
    z = logits(seed=4)[0]
    y[0] = -100
    got, want = dhkd_loss(z, a, t, y), dhkd_loss(z[1:], a[1:], t[1:], y[1:])
    torch.testing.assert_close(got.loss, want.loss)


@pytest.mark.parametrize("options", [{}, {"align": False, "aux": "linear"}, {"aux": "none"}], ids=str)
def test_by_name_trains_resumes_and_deploys_the_student_alone(tmp_path, options):
    pytest.importorskip("accelerate")
    from kdfast.train import Distiller

    x, y = torch.randn(40, 3), torch.arange(40) % 4

    def distiller(out):
        torch.manual_seed(0)
        student, teacher = (nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4)) for _ in range(2))
        return Distiller(student, teacher, "dhkd", options=options, out=out, progress=False, log_every=1)

    loader = DataLoader(TensorDataset(x, y), 10, shuffle=True)
    whole, half = distiller(tmp_path / "whole"), distiller(tmp_path / "half")
    whole.fit(loader, 3)
    half.fit(loader, 2)
    again = distiller(tmp_path / "half")
    again.fit(loader, 3, resume=True)
    for name, value in whole.net.state_dict().items():
        assert torch.equal(again.net.state_dict()[name], value), name
    assert ("conflict" in whole.history.columns()) == options.get("align", True)
    deployed = whole.deploy()
    assert dual_heads(deployed) == [] and len(dual_heads(whole.student)) == (options.get("aux") != "none")
    whole.student.eval()
    assert torch.equal(deployed(x), whole.student(x))
    assert {"0.weight", "0.bias", "2.weight", "2.bias"} == set(deployed.state_dict())


def test_bad_options_are_refused_when_bound():
    for options in ({"aux": "deep"}, {"loss": "kl"}, {"alpha": -1.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            methods.load("dhkd")(**options)
