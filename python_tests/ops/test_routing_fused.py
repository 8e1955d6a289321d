"""The compiled routing kernels: every mode of torch, the error budget against float64, every dtype and stride."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from modes import MODES, check_mode
from tolerances import check_against_reference

from kdfast import _core
from kdfast.ops import combine, dispatch, grouped_linear, grouped_mlp, make_plan, route_topk
from kdfast.ops.routing import SCORES

pytestmark = pytest.mark.skipif(_core.core is None, reason="needs the compiled core")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def spread_logits(rows, experts, dtype, seed=0):
    """Values that no dtype of the list rounds together, so that every one of them makes the same choice."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([(torch.randperm(experts, generator=generator) - experts / 2) / 8 for _ in range(rows)]).to(
        dtype
    )


def operands(rows=7, experts=5, k=2, width=6, hidden=9, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    ids = route_topk(torch.randn(rows, experts, generator=generator), k).ids
    weights = (0.2 + torch.rand(rows, k, generator=generator)).to(torch.promote_types(dtype, torch.float32))
    return dict(
        plan=make_plan(ids, experts, capacity=max(1, rows * k // experts)), x=draw(rows, width), rows=draw(rows * k, width),
        weights=weights.requires_grad_(), w1=draw(experts, hidden, width), b1=draw(experts, hidden), w2=draw(experts, width, hidden),
        b2=draw(experts, width), w3=draw(experts, hidden, width),
    )  # fmt: skip


def at(plan, tensor):
    """The plan on the device of a tensor (meta, in one mode)."""
    return plan._replace(**{n: t.to(tensor.device) for n, t in plan._asdict().items() if n != "block"})


# ---------------------------------------------------------------- modes
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("score", ["softmax_after_topk", "softmax", "sigmoid"])
def test_route_modes(mode, score):
    bias = torch.linspace(-0.1, 0.1, 6)
    logits = spread_logits(5, 6, torch.float32).requires_grad_()

    def function(logits):
        routing = route_topk(logits, 3, score=score, bias=bias.to(logits.device), groups=2, topk_groups=1)
        return routing.weights, routing.mean_probs, routing.lse

    check_mode(mode, function, (logits,))


@pytest.mark.parametrize("mode", MODES)
def test_move_modes(mode):
    o = operands()

    def function(x, weights):
        plan = at(o["plan"], x)
        return combine(dispatch(x, plan), weights, plan)

    check_mode(mode, function, (o["x"], o["weights"]))


@pytest.mark.parametrize("mode", MODES)
def test_linear_modes(mode):
    o = operands()
    check_mode(mode, lambda rows, w, b: grouped_linear(rows, at(o["plan"], rows), w, b), (o["rows"], o["w1"], o["b1"]))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("gated", [False, True])
def test_mlp_modes(mode, gated):
    o = operands()
    names = ["x", "w1", "b1", "w2", "b2", "weights", *(["w3"] if gated else [])]

    def function(x, w1, b1, w2, b2, weights, w3=None):
        return grouped_mlp(x, at(o["plan"], x), w1, b1, w2, b2, weights, activation="silu", w3=w3)

    check_mode(mode, function, [o[name] for name in names])


@pytest.mark.parametrize("mode", ["fake", "meta", "export", "compile"])
def test_plan_in_a_graph(mode):
    """The whole layer in one graph: scores, plan, experts."""
    o = operands()
    w1, w2 = o["w1"].detach(), o["w2"].detach()

    def function(x, logits):
        routing = route_topk(logits, 2, score="softmax")
        plan = make_plan(routing.ids, 5, skip_zero=routing.weights)
        return grouped_mlp(x, plan, w1, None, w2, None, routing.weights)

    if mode == "meta":
        pytest.skip("the closure's weights are not on meta")
    check_mode(mode, function, (o["x"], spread_logits(7, 5, torch.float32).requires_grad_()))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # dynamo's own
def test_inductor():
    """The whole layer, compiled for real, with its auxiliary statistics."""
    o = operands()
    w1, w2 = o["w1"].detach(), o["w2"].detach()

    def function(x, logits):
        routing = route_topk(logits, 2, score="softmax")
        y = grouped_mlp(x, make_plan(routing.ids, 5), w1, None, w2, None, routing.weights)
        return y.square().sum() + routing.mean_probs.square().sum() + routing.lse.sum()

    inputs = o["x"], spread_logits(7, 5, torch.float32).requires_grad_()
    want = torch.autograd.grad(function(*inputs), inputs)
    got = torch.autograd.grad(torch.compile(function, fullgraph=True)(*inputs), inputs)
    torch.testing.assert_close(got, want)


# ---------------------------------------------------------------- error budget against float64
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("normalise", [None, 1.0, 2.5])
def test_scores_within_budget(dtype, score, normalise):
    if normalise is not None and score in ("logits", "mean", "softmax_after_topk"):
        pytest.skip("this score takes no norm")
    logits = spread_logits(40, 37, dtype).requires_grad_()

    def run(backend):
        def function(logits):
            routing = route_topk(logits, 5, score=score, normalise=normalise, backend=backend)
            return routing.weights, routing.mean_probs, routing.lse

        return function

    check_against_reference(run("cpu"), run("reference"), (logits,))
    assert torch.equal(run_ids(logits, "cpu", score), run_ids(logits, "reference", score))


def run_ids(logits, backend, score):
    return route_topk(logits, 5, score=score, backend=backend).ids


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 64, 133])
def test_moves_within_budget(dtype, width):
    o = operands(rows=11, k=3, width=width, dtype=dtype)
    plan = o["plan"]
    # The upstream gradient of a half-precision output is rounded, the truth's is not: up to 2^-9 (2^-12) of each of 3 terms.
    floor = {torch.bfloat16: (8e-3, 8e-3), torch.float16: (1e-3, 1e-3)}.get(dtype)
    for weighted in (True, False):
        inputs = (o["rows"], o["weights"]) if weighted else (o["rows"],)
        check_against_reference(
            lambda rows, weights=None: combine(rows, weights, plan, backend="cpu"),
            lambda rows, weights=None: combine(rows, weights, plan, backend="reference"),
            inputs,
            gradient_floor=floor,
        )
    check_against_reference(
        lambda x: dispatch(x, plan, backend="cpu"),
        lambda x: dispatch(x, plan, backend="reference"),
        (o["x"],),
        gradient_floor=floor,
    )


@given(
    rows=st.integers(0, 40), experts=st.integers(1, 200), seed=st.integers(0, 10**6), levels=st.sampled_from([2, 7, 10**6]),
    dtype=st.sampled_from(DTYPES), strided=st.booleans(), score=st.sampled_from(SCORES), data=st.data(),
)  # fmt: skip
def test_choice_equals_the_reference(rows, experts, seed, levels, dtype, strided, score, data):
    """Ties, -inf, masked rows, groups: the same ids, bit for bit, where the score does not round (logits)."""
    groups = data.draw(st.sampled_from([g for g in (1, 2, 4) if experts % g == 0]))
    topk_groups = data.draw(st.integers(1, groups))
    k = data.draw(st.integers(1, topk_groups * experts // groups))
    generator = torch.Generator().manual_seed(seed)
    z = torch.randint(levels, (experts, rows) if strided else (rows, experts), generator=generator)
    z = (z / levels * 8).masked_fill(torch.rand(z.shape, generator=generator) < 0.1, -torch.inf).to(dtype)
    z = z.t() if strided else z
    z[:, :1] = 0
    bias = torch.randint(3, (experts,), generator=generator).float() if seed % 2 else None
    mask = torch.rand(rows, generator=generator) < 0.8
    options = dict(k=k, groups=groups, topk_groups=topk_groups, bias=bias, mask=mask)
    got, want = (route_topk(z, score="logits", backend=b, **options) for b in ("cpu", "reference"))
    assert torch.equal(got.ids, want.ids) and torch.equal(got.counts, want.counts)
    torch.testing.assert_close(got.weights, want.weights)
    torch.testing.assert_close(got.mean_probs, want.mean_probs)
    torch.testing.assert_close(got.lse, want.lse)
    rounded = route_topk(z, score=score, backend="cpu", **options)  # rounds: ids must at least be distinct and in range
    assert torch.equal(
        rounded.ids[mask].sort().values.diff() > 0, torch.ones_like(rounded.ids[mask][:, 1:], dtype=torch.bool)
    )
    assert ((rounded.ids >= 0) & (rounded.ids < experts))[mask].all() and (rounded.ids[~mask] == -1).all()


@given(
    rows=st.integers(0, 60), k=st.integers(1, 5), experts=st.integers(1, 40), block=st.sampled_from([1, 3, 16]),
    capacity=st.none() | st.integers(1, 9), order=st.sampled_from(["token", "choice"]), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_plan_equals_the_reference(rows, k, experts, block, capacity, order, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-2, experts + 1, (rows, k), generator=generator)
    weights = torch.randint(2, (rows, k), generator=generator).float() if seed % 2 else None
    options = dict(block=block, capacity=capacity, order=order, skip_zero=weights, validate=False)
    got, want = (make_plan(ids, experts, backend=b, **options) for b in ("cpu", "reference"))
    assert all(torch.equal(a, b) for a, b in zip(got[:-1], want[:-1]))


def test_large_plan_in_several_blocks():
    ids = torch.randint(300, (9000, 3), generator=torch.Generator().manual_seed(0))
    got, want = (make_plan(ids, 300, capacity=80, backend=b) for b in ("cpu", "reference"))
    assert all(torch.equal(a, b) for a, b in zip(got[:-1], want[:-1]))


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu", "identity"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_mlp_equals_the_reference(activation, dtype):
    o = operands(rows=30, k=3, width=16, hidden=24, dtype=dtype)
    names = ["x", "w1", "b1", "w2", "b2", "weights", "w3"]
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.06}[dtype]
    results = []
    for backend in ("cpu", "reference"):
        inputs = [o[name].detach().clone().requires_grad_() for name in names]
        y = grouped_mlp(
            inputs[0], o["plan"], *inputs[1:5], inputs[5], activation=activation, w3=inputs[6], backend=backend
        )
        factors = torch.linspace(-1, 1, y.numel()).view_as(y)
        results.append([y, *torch.autograd.grad((y * factors).sum(), inputs)])
    for name, got, want in zip(["y", *names], *results):
        scale = want.abs().max().item()
        assert scale > 0 and got.dtype == want.dtype
        torch.testing.assert_close(got / scale, want / scale, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def test_one_thread_and_two_give_the_same_bits():
    logits = torch.randn(3000, 64).requires_grad_()
    x = torch.randn(3000, 48).requires_grad_()
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            routing = route_topk(logits, 4, score="softmax")
            plan = make_plan(routing.ids, 64)
            y = combine(dispatch(x, plan), routing.weights, plan)
            loss = y.pow(2).sum() + routing.mean_probs.pow(2).sum()
            results.append([*routing, *plan[:-1], y, *torch.autograd.grad(loss, (logits, x))])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results))
