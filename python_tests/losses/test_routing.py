"""Balance losses: known answers, the closed-form gradients, and what must not get a gradient."""

import math

import pytest
import torch

from kdfast.losses import (
    LoadBalancingLoss,
    RouterZLoss,
    UniformKLLoss,
    importance_load_loss,
    load_balancing_loss,
    router_z_loss,
    uniform_kl_loss,
    usage_cv_loss,
)  # fmt: skip
from kdfast.ops import dense_weights, noisy_logits, route_topk

DOUBLE = torch.float64


def random_logits(rows=9, experts=5, seed=0):
    return torch.randn(rows, experts, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def test_balance_of_a_uniform_and_of_a_collapsed_router():
    assert load_balancing_loss(route_topk(torch.zeros(8, 4), 2, score="softmax")).item() == pytest.approx(1.0)
    collapsed = torch.zeros(8, 4)
    collapsed[:, 2] = 50.0
    assert load_balancing_loss(route_topk(collapsed, 1, score="softmax")).item() == pytest.approx(4.0)


@pytest.mark.parametrize("k", [1, 3])
def test_balance_gradient_is_the_closed_form(k):
    z = random_logits()
    routing = route_topk(z, k, score="softmax")
    (got,) = torch.autograd.grad(load_balancing_loss(routing), z)
    p = z.detach().softmax(-1)
    h = 5 * routing.counts.double() / (9 * k)
    want = p * (h - (p * h).sum(-1, keepdim=True)) / 9
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    assert want.abs().max() > 1e-3


def test_first_choice_counts_only_the_first():
    z = random_logits()
    routing = route_topk(z, 2, score="softmax")
    counts = torch.bincount(routing.ids[:, 0].long(), minlength=5)
    want = 5 * (counts.double() / 9 * z.softmax(-1).mean(0)).sum()
    torch.testing.assert_close(load_balancing_loss(routing, first_choice=True), want)
    torch.testing.assert_close(LoadBalancingLoss(first_choice=True)(routing), want)


def test_padding_rows_do_not_count():
    z = random_logits()
    padded = torch.cat((z, torch.full((3, 5), 100.0, dtype=DOUBLE)))
    mask = torch.arange(12) < 9
    for loss in (load_balancing_loss, lambda r: load_balancing_loss(r, first_choice=True), importance_load_loss):
        torch.testing.assert_close(loss(route_topk(padded, 2, mask=mask)), loss(route_topk(z, 2)))
    torch.testing.assert_close(router_z_loss(padded, mask=mask), router_z_loss(z))
    for loss in (uniform_kl_loss, usage_cv_loss):
        torch.testing.assert_close(loss(padded.softmax(-1), mask=mask), loss(z.softmax(-1)))


def test_no_kept_row_is_exactly_zero():
    z = random_logits()
    none = torch.zeros(9, dtype=torch.bool)
    loss = load_balancing_loss(route_topk(z, 2, mask=none)) + router_z_loss(z, mask=none)
    assert loss.item() == 0.0
    assert (torch.autograd.grad(loss, z)[0] == 0).all()


def noisy_case(k=2, rows=9, experts=5):
    z, raw = random_logits(rows, experts), random_logits(rows, experts, seed=1)
    noise = torch.randn(rows, experts, dtype=DOUBLE, generator=torch.Generator().manual_seed(2))
    return z, raw, noise, k


def shazeer_loss(z, raw, noise, k):
    """The published formulas, row by row, entry by entry."""
    std = torch.log1p(raw.exp()) + 0.01
    noisy = z + noise * std
    rows, experts = z.shape
    ranked = noisy.sort(-1, descending=True)
    importance, load = [0.0] * experts, [0.0] * experts
    for n in range(rows):
        chosen = ranked.indices[n, :k].tolist()
        weights = ranked.values[n, :k].softmax(-1)
        for j, e in enumerate(chosen):
            importance[e] = importance[e] + weights[j]
        for e in range(experts):
            threshold = ranked.values[n, k] if e in chosen else ranked.values[n, k - 1]
            load[e] = load[e] + 0.5 * (1 + torch.erf((z[n, e] - threshold) / std[n, e] / math.sqrt(2)))
    importance, load = torch.stack(importance), torch.stack(load)
    return sum(v.var() / (v.mean() ** 2 + 1e-10) for v in (importance, load))


def test_importance_and_load_equal_the_published_loops():
    z, raw, noise, k = noisy_case()
    noisy, std = noisy_logits(z, raw, noise=noise)
    got = importance_load_loss(route_topk(noisy, k), logits=z, noisy_logits=noisy, std=std)
    want = shazeer_loss(z, raw, noise, k)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    for a, b in zip(torch.autograd.grad(got, (z, raw)), torch.autograd.grad(want, (z, raw))):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        assert b.abs().max() > 1e-4


def test_hard_load_when_k_is_e_or_without_noise():
    z, raw, noise, _ = noisy_case()
    routing = route_topk(z, 2)
    importance = dense_weights(routing).sum(0)
    want = (
        importance.var() / importance.mean() ** 2 + routing.counts.double().var() / routing.counts.double().mean() ** 2
    )
    torch.testing.assert_close(importance_load_loss(routing), want)
    noisy, std = noisy_logits(z, raw, noise=noise)
    every = route_topk(noisy, 5)
    assert importance_load_loss(every, logits=z, noisy_logits=noisy, std=std) == importance_load_loss(every)
    one = route_topk(z[:, :1], 1, score="softmax")
    assert importance_load_loss(one).item() == 0.0
    with pytest.raises(ValueError, match="all three or none"):
        importance_load_loss(routing, logits=z)


def test_masked_experts_keep_the_load_finite():
    z, raw, noise, k = noisy_case()
    masked = z.masked_fill(torch.arange(5) == 3, -math.inf)
    noisy, std = noisy_logits(masked, raw, noise=noise)
    loss = importance_load_loss(route_topk(noisy, k), logits=masked, noisy_logits=noisy, std=std)
    grads = torch.autograd.grad(loss, (z, raw))
    assert torch.isfinite(loss) and all(torch.isfinite(g).all() for g in grads)


def test_z_loss():
    z = random_logits()
    loss = router_z_loss(z)
    lse = z.detach().exp().sum(-1).log()
    torch.testing.assert_close(loss.detach(), lse.square().mean())
    want = 2 / 9 * lse.unsqueeze(-1) * z.detach().softmax(-1)
    torch.testing.assert_close(torch.autograd.grad(loss, z)[0], want)
    torch.testing.assert_close(RouterZLoss(reduction="sum")(z), 9 * loss)
    torch.testing.assert_close(route_topk(z, 2).lse.square().mean(), loss)


def test_uniform_kl():
    p = torch.tensor([[0.9, 0.1], [0.3, 0.7]], dtype=DOUBLE, requires_grad=True)  # mean 0.6, 0.4
    want = 0.5 * (math.log(0.5) - math.log(0.6)) + 0.5 * (math.log(0.5) - math.log(0.4))
    assert uniform_kl_loss(p, divide_by_experts=False).item() == pytest.approx(want, rel=1e-12)
    assert UniformKLLoss()(p).item() == pytest.approx(want / 2, rel=1e-12)
    assert uniform_kl_loss(p.detach().mean(0)).item() == pytest.approx(want / 2, rel=1e-12)
    assert uniform_kl_loss(torch.full((3, 4), 0.25)).item() == 0.0
    with pytest.raises(ValueError, match=r"probs: expected \[N, E\]"):
        uniform_kl_loss(p[None])


def test_usage_cv():
    p = torch.tensor([[0.9, 0.1], [0.3, 0.7]], dtype=DOUBLE)
    assert usage_cv_loss(p).item() == pytest.approx(math.sqrt(2 * 0.01) / 0.5, rel=1e-12)
    flat = torch.full((3, 4), 0.25, requires_grad=True)
    loss = usage_cv_loss(flat)
    assert loss.item() == 0 and (torch.autograd.grad(loss, flat)[0] == 0).all()
    assert usage_cv_loss(torch.ones(3, 1)).item() == 0
