"""route_topk: hand-made tables, exact gradients, ties, bad values; the plan, the moves and the experts follow in their own files."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdfast.ops.routing import SCORES, dense_weights, route_topk, route_topk_reference

OPTIONS = [
    dict(score="softmax_after_topk"),
    dict(score="softmax"),
    dict(score="softmax", normalise=1.0, route_scale=1.5),
    dict(score="softmax", normalise=2.0),
    dict(score="softmax", normalise=1.0, eps=0.1),
    dict(score="sigmoid", normalise=1.0, route_scale=2.5),
    dict(score="sigmoid", normalise=3.0, eps=0.2),
    dict(score="sigmoid"),
    dict(score="sqrt_softplus", normalise=1.0),
    dict(score="sqrt_softplus", route_scale=0.5),
    dict(score="logits", route_scale=2.0),
    dict(score="mean"),
]
NAMES = [" ".join(f"{k}={v}" for k, v in option.items()) for option in OPTIONS]


def logits_away_from_ties(rows, experts, seed=0, dtype=torch.float64, gap=0.05):
    """Random rows whose entries are at least `gap` apart, so a small step never changes the selection."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.stack([torch.randperm(experts, generator=generator) for _ in range(rows)]).double()
    return (base * gap * 2 + 0.4 * gap * torch.rand(rows, experts, generator=generator) - gap * experts).to(dtype)


# ---------------------------------------------------------------- known answers
def test_softmax_after_topk_by_hand():
    z = torch.tensor([[0.0, math.log(3.0), -5.0, math.log(9.0)]])
    routing = route_topk(z, 2)
    assert routing.ids.tolist() == [[3, 1]] and routing.ids.dtype == torch.int32
    torch.testing.assert_close(routing.weights, torch.tensor([[0.75, 0.25]]))
    assert routing.counts.tolist() == [0, 1, 0, 1]
    torch.testing.assert_close(routing.lse, torch.tensor([math.log(13 + math.exp(-5))]))


def test_softmax_raw_weights_are_the_probabilities():
    z = torch.randn(5, 7, dtype=torch.float64)
    routing = route_topk(z, 3, score="softmax", route_scale=2.0)
    torch.testing.assert_close(routing.weights, 2 * z.softmax(-1).topk(3).values)
    torch.testing.assert_close(routing.mean_probs, z.softmax(-1).mean(0))


def test_softmax_normalised_equals_softmax_after_topk():
    z = torch.randn(20, 9, dtype=torch.float64)
    after, before = route_topk(z, 4), route_topk(z, 4, score="softmax", normalise=1.0)
    torch.testing.assert_close(after.weights, before.weights)
    assert torch.equal(after.ids, before.ids)


def test_normalised_weights_do_not_underflow():
    routing = route_topk(torch.tensor([[-2000.0, -2001.0, -3000.0]]), 2, score="sigmoid", normalise=1.0)
    torch.testing.assert_close(routing.weights, torch.tensor([[1.0, math.exp(-1)]]) / (1 + math.exp(-1)))


def test_p_norm():
    z = torch.randn(6, 5, dtype=torch.float64)
    p = z.softmax(-1).topk(3).values
    routing = route_topk(z, 3, score="softmax", normalise=2.0)
    torch.testing.assert_close(routing.weights, p / p.norm(dim=-1, keepdim=True))


def test_ties_go_to_the_lower_id():
    z = torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0], [0.0, -0.0, 0.0, -0.0, 0.0]])
    assert route_topk(z, 4).ids.tolist() == [[1, 2, 4, 0], [0, 1, 2, 3]]


def test_underflowed_probabilities_tie():
    z = torch.tensor([[0.0, -2000.0, -1000.0]])  # both probabilities are 0 in float32
    assert route_topk(z, 2, score="softmax").ids.tolist() == [[0, 1]]
    assert route_topk(z, 2).ids.tolist() == [[0, 2]]


def test_masked_expert_has_weight_zero_when_it_must_be_chosen():
    inf = math.inf
    z = torch.tensor([[-inf, 1.0, -inf, -inf]], requires_grad=True)
    for option in OPTIONS:
        routing = route_topk(z, 3, **option)
        assert routing.ids.tolist() == [[1, 0, 2]]
        assert routing.weights[0, 1:].tolist() == [0.0, 0.0]
        (grad,) = torch.autograd.grad(routing.weights[0, 0] + routing.lse.sum(), z)
        assert torch.isfinite(grad).all() and (grad[0, [0, 2, 3]] == 0).all()


def test_bias_selects_and_does_not_weigh():
    z = torch.tensor([[0.0, 1.0, 2.0]], requires_grad=True)
    bias = torch.tensor([5.0, 0.0, 0.0], requires_grad=True)
    routing = route_topk(z, 2, score="sigmoid", bias=bias)
    assert routing.ids.tolist() == [[0, 2]]
    torch.testing.assert_close(routing.weights, torch.sigmoid(z)[:, [0, 2]])
    routing.weights.sum().backward()
    assert bias.grad is None and z.grad[0, 1] == 0


def test_group_limit_by_hand():
    z = torch.tensor([[9.0, 0.0, 8.0, 8.5, 7.0, 7.5]])  # groups (9, 0), (8, 8.5), (7, 7.5)
    assert route_topk(z, 2, score="logits", groups=3).ids.tolist() == [[0, 1]]  # best = 9
    biased = route_topk(z, 2, score="logits", groups=3, bias=torch.zeros(6))
    assert biased.ids.tolist() == [[3, 2]]  # two best: 9, 16.5, 14.5
    tie = route_topk(torch.tensor([[1.0, 3.0, 3.0, 1.0]]), 2, score="logits", groups=2)
    assert tie.ids.tolist() == [[1, 0]]  # equal groups: the lower one
    alone = route_topk(z, 3, score="logits", groups=6, topk_groups=3, bias=torch.zeros(6))
    assert alone.ids.tolist() == [[0, 3, 2]]


def test_filler_from_a_closed_group_has_weight_zero():
    z = torch.tensor([[4.0, -math.inf, 1.0, 1.0]])
    routing = route_topk(z, 2, groups=2)
    assert routing.ids.tolist() == [[0, 1]] and routing.weights.tolist() == [[1.0, 0.0]]


def test_mask_rows_are_not_read():
    z = torch.randn(4, 5, dtype=torch.float64)
    poisoned = torch.cat((z, torch.full((2, 5), math.nan, dtype=z.dtype))).requires_grad_()
    mask = torch.tensor([True] * 4 + [False] * 2)
    routing, plain = route_topk(poisoned, 2, mask=mask), route_topk(z, 2)
    assert routing.ids[4:].tolist() == [[-1, -1]] * 2 and routing.weights[4:].abs().sum() == 0
    assert torch.equal(routing.counts, plain.counts)
    torch.testing.assert_close(routing.mean_probs, plain.mean_probs)
    (routing.weights[:, 0].sum() + (routing.mean_probs**2).sum() + routing.lse.sum()).backward()
    assert torch.isfinite(poisoned.grad).all() and (poisoned.grad[4:] == 0).all() and poisoned.grad[:4].abs().sum() > 0


# ---------------------------------------------------------------- bad values
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_rows_raise_or_become_nan(bad):
    z = torch.randn(3, 6)
    z[1] = bad if bad < 0 else z[1]
    z[1, 2] = bad
    with pytest.raises(ValueError, match="logits: expected"):
        route_topk(z, 2)
    for option in OPTIONS:
        routing = route_topk(z, 6, validate=False, **option)
        assert routing.weights[1].isnan().all() and torch.isfinite(routing.weights[[0, 2]]).all()
        assert sorted(routing.ids[1].tolist()) == list(range(6))  # distinct ids inside [0, E)
    if math.isnan(bad):
        assert routing.ids[1, -1] == 2  # NaN sorts last


def test_all_nan_row_gets_distinct_ids():
    assert route_topk(torch.full((1, 5), math.nan), 3, validate=False).ids.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(k=0), "k: expected an int >= 1"),
        (dict(k=9), "k: expected at most the number of experts"),
        (dict(k=5, groups=2), "k: expected at most the 4 experts that the group limit leaves"),
        (dict(groups=3), "groups: expected a divisor"),
        (dict(topk_groups=2), "topk_groups: expected at most groups"),
        (dict(score="softmx"), "score: expected one of"),
        (dict(score="logits", normalise=1.0), "normalise: score='logits'"),
        (dict(normalise=2.0), "normalise: score='softmax_after_topk'"),
        (dict(eps=1e-9), "eps: it is added to the norm"),
        (dict(score="mean", route_scale=2.0), "route_scale: score='mean'"),
        (dict(bias=torch.zeros(7)), r"bias: expected \[8\]"),
        (dict(bias=torch.full((8,), math.nan)), "bias: expected finite"),
        (dict(mask=torch.ones(2, dtype=torch.bool)), "mask: expected shape"),
        (dict(mask=torch.ones(3)), "mask: expected bool"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        route_topk(torch.randn(3, 8), **arguments)
    if "k" not in arguments:
        with pytest.raises(ValueError, match=r"logits: expected \[N, E\]"):
            route_topk(torch.randn(8))


def test_constant_weight_warns():
    z = torch.randn(3, 4, requires_grad=True)
    with pytest.warns(UserWarning, match="no gradient"):
        route_topk(z, 1)
    route_topk(z, 1, score="softmax")


# ---------------------------------------------------------------- gradients
@pytest.mark.parametrize("option", OPTIONS, ids=NAMES)
@pytest.mark.parametrize("extra", [{}, dict(bias=True, groups=3, topk_groups=2)], ids=["plain", "biased groups"])
def test_gradcheck(option, extra):
    z = logits_away_from_ties(4, 6).requires_grad_()
    extra = extra | ({"bias": torch.linspace(-0.1, 0.1, 6, dtype=torch.float64)} if extra else {})

    def outputs(z):
        routing = route_topk(z, 3, **option, **extra)
        return dense_weights(routing), routing.mean_probs, routing.lse

    assert torch.autograd.gradcheck(outputs, z)


@pytest.mark.parametrize("option", OPTIONS, ids=NAMES)
def test_gradient_equals_the_module_equation(option):
    """The closed forms of the docstring, written out here a second time from the score itself."""
    z = logits_away_from_ties(5, 7, seed=3).requires_grad_()
    routing = route_topk(z, 3, **option)
    cotangent = torch.randn_like(routing.weights)
    (got,) = torch.autograd.grad((routing.weights * cotangent).sum() + 0 * z.sum(), z)  # "mean" has no path to z
    score, r = option["score"], option.get("route_scale", 1.0)
    q = 1.0 if score == "softmax_after_topk" else option.get("normalise")
    ids, w, x = routing.ids.long(), routing.weights.detach(), z.detach()
    p = x.softmax(-1)
    s = {"sigmoid": x.sigmoid(), "sqrt_softplus": torch.log1p(x.exp()).sqrt()}.get(score, p).gather(1, ids)
    dl = w * cotangent
    if q is not None:
        norm = (s**q).sum(-1, keepdim=True) ** (1 / q)
        dl = dl - (s / norm) ** q * norm / (norm + option.get("eps", 0.0)) * dl.sum(-1, keepdim=True)
    want = torch.zeros_like(x)
    if score in ("softmax", "softmax_after_topk"):
        want = want.scatter(1, ids, dl) - p * dl.sum(-1, keepdim=True)
    elif score == "sigmoid":
        want = want.scatter(1, ids, (1 - s) * dl)
    elif score == "sqrt_softplus":
        want = want.scatter(1, ids, dl * x.gather(1, ids).sigmoid() / (2 * s**2))
    elif score == "logits":
        want = want.scatter(1, ids, r * cotangent)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    assert score == "mean" or want.abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_scores_are_float32(dtype):
    z = torch.randn(10, 16).to(dtype).requires_grad_()
    routing = route_topk(z, 4, score="sigmoid", normalise=1.0)
    assert routing.weights.dtype == routing.lse.dtype == routing.mean_probs.dtype == torch.float32
    exact = route_topk(z.detach().double(), 4, score="sigmoid", normalise=1.0)
    torch.testing.assert_close(routing.weights.double(), exact.weights, rtol=1e-6, atol=1e-7)
    routing.weights[:, 0].sum().backward()
    assert z.grad.dtype == dtype and z.grad.abs().sum() > 0


# ---------------------------------------------------------------- properties
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 9), experts=st.integers(1, 70), seed=st.integers(0, 1000), score=st.sampled_from(SCORES),
    levels=st.sampled_from([2, 5, 1000]), data=st.data(),
)  # fmt: skip
def test_invariants(rows, experts, seed, score, levels, data):
    k = data.draw(st.integers(1, experts))
    generator = torch.Generator().manual_seed(seed)
    z = torch.randint(levels, (rows, experts), generator=generator).float() / levels * 4  # few levels: many ties
    routing = route_topk(z, k, score=score)
    order = z.sort(dim=-1, descending=True, stable=True).indices[:, :k] if rows else torch.zeros(0, k)
    assert torch.equal(routing.ids.long(), order.long())
    assert routing.counts.sum() == rows * k
    assert torch.equal(routing.counts.long(), torch.bincount(routing.ids.flatten().long(), minlength=experts))
    if rows and score in ("softmax_after_topk", "mean"):
        torch.testing.assert_close(routing.weights.sum(-1), torch.ones(rows))
    if rows:
        torch.testing.assert_close(routing.mean_probs.sum(), torch.tensor(1.0))
        shuffle = torch.randperm(rows, generator=generator)
        shuffled = route_topk(z[shuffle], k, score=score)
        assert torch.equal(shuffled.ids, routing.ids[shuffle]) and torch.equal(
            shuffled.weights, routing.weights[shuffle]
        )


def test_same_bits_over_100_runs():
    z = torch.randn(300, 64)
    first = route_topk(z, 6, score="softmax")
    for _ in range(100):
        assert all(torch.equal(a, b) for a, b in zip(first, route_topk(z, 6, score="softmax")))


def test_reference_has_second_derivatives():
    z = logits_away_from_ties(2, 4).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda z: route_topk_reference(z, 2, score="softmax").weights, z)
