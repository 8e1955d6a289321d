"""make_plan, dispatch, combine, grouped experts and router noise: hand-made tables, dense references, gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdfast.ops import (
    combine,
    dense_weights,
    dispatch,
    drop_second_choice,
    expert_capacity,
    grouped_linear,
    grouped_mlp,
    jitter,
    make_plan,
    noisy_logits,
    route_topk,
)  # fmt: skip
from kdfast.ops.routing_experts import ACTIVATIONS

IDS = torch.tensor([[0, 2], [2, 1], [2, 0], [0, 2], [3, 2]], dtype=torch.int32)


# ---------------------------------------------------------------- the plan, by hand
def test_plan_by_hand():
    plan = make_plan(IDS, 4, block=4)
    assert plan.order.tolist() == [0, 5, 6, 3, 1, 2, 4, 7, 9, 8]
    assert plan.inverse.flatten().tolist() == [0, 4, 5, 3, 6, 1, 2, 7, 9, 8]
    assert plan.counts.tolist() == [3, 1, 5, 1] and plan.offsets.tolist() == [0, 3, 4, 9, 10]
    assert plan.padded_offsets.tolist() == [0, 4, 8, 16, 20]
    assert plan.row_slot.tolist() == [0, 5, 6, -1, 3, -1, -1, -1, 1, 2, 4, 7, 9, -1, -1, -1, 8, -1, -1, -1, -1, -1]
    assert plan.block_expert.tolist() == [0, 1, 2, 2, 3, -1]
    assert all(t.dtype == torch.int32 for t in plan[:-1])


def test_capacity_in_token_and_choice_order():
    token = make_plan(IDS, 4, block=4, capacity=2)
    assert token.position.flatten().tolist() == [0, 0, 1, 0, 2, 1, 2, 3, 0, 4]
    assert token.order.tolist() == [0, 5, 3, 1, 2, 8, -1, -1, -1, -1] and token.counts.tolist() == [2, 1, 2, 1]
    choice = make_plan(IDS, 4, block=4, capacity=2, order="choice")
    assert choice.position.flatten().tolist() == [0, 2, 0, 0, 1, 2, 1, 3, 0, 4]
    assert (choice.inverse.flatten() >= 0).tolist() == [True, False, True, True, True, False, True, False, True, False]
    assert (token.inverse.flatten()[[4, 6, 7, 9]] == -1).all()


def test_dropped_slots_and_repeats():
    plan = make_plan(torch.tensor([[-1, 1], [1, 1], [-1, -1]]), 3, block=2)
    assert plan.order.tolist() == [1, 2, 3, -1, -1, -1]
    assert plan.position.tolist() == [[-1, 0], [1, 2], [-1, -1]] and plan.counts.tolist() == [0, 3, 0]
    assert plan.row_slot.tolist() == [1, 2, 3] + [-1] * 6 and plan.block_expert.tolist() == [1, 1] + [-1] * 4


def test_zero_weights_can_be_left_out():
    weights = torch.tensor([[0.5, 0.0], [0.0, 1.0]], dtype=torch.float64, requires_grad=True)
    plan = make_plan(torch.tensor([[0, 1], [0, 1]]), 2, skip_zero=weights)
    assert plan.inverse.tolist() == [[0, -1], [-1, 1]]
    combine(torch.ones(4, 3, dtype=torch.float64), weights, plan).sum().backward()
    assert weights.grad.tolist() == [[3.0, 0.0], [0.0, 3.0]]


@pytest.mark.parametrize(
    "factor, rounding, expected", [(None, "ceil", None), (0, "ceil", None), (1.25, "ceil", 7), (1.25, "floor", 6)]
)
def test_expert_capacity(factor, rounding, expected):
    assert expert_capacity(factor, 10, 2, 4, rounding=rounding) == expected


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(0, 40), k=st.integers(1, 4), experts=st.integers(1, 9), block=st.integers(1, 6), seed=st.integers(0, 999),
    capacity=st.none() | st.integers(1, 12), order=st.sampled_from(["token", "choice"]),
)  # fmt: skip
def test_plan_equals_a_loop(rows, k, experts, block, seed, capacity, order):
    ids = torch.randint(-1, experts, (rows, k), generator=torch.Generator().manual_seed(seed))
    plan = make_plan(ids, experts, block=block, capacity=capacity, order=order)
    table = ids.tolist()
    slots = [(n, j) for n in range(rows) for j in range(k)]
    ranked = slots if order == "token" else sorted(slots, key=lambda s: (s[1], s[0]))
    seen, position = [0] * experts, {}
    for n, j in ranked:
        e = table[n][j]
        position[n, j] = -1 if e < 0 else seen[e]
        seen[e] += e >= 0
    kept = [(n, j) for n, j in slots if 0 <= position[n, j] < (capacity or 10**9)]
    grouped = sorted(kept, key=lambda s: table[s[0]][s[1]])  # stable
    assert plan.position.tolist() == [[position[n, j] for j in range(k)] for n in range(rows)]
    assert plan.order.tolist() == [n * k + j for n, j in grouped] + [-1] * (rows * k - len(grouped))
    counts = [sum(table[n][j] == e for n, j in kept) for e in range(experts)]
    assert plan.counts.tolist() == counts
    padded, blocks = [], []
    for e in range(experts):
        mine = [n * k + j for n, j in grouped if table[n][j] == e]
        padded += mine + [-1] * (-len(mine) % block)
        blocks += [e] * -(-len(mine) // block)
    bound = rows * k + min(experts, rows * k) * (block - 1)
    assert plan.row_slot.tolist() == padded + [-1] * (bound - len(padded))
    assert plan.block_expert.tolist() == blocks + [-1] * (rows * k // block + min(experts, rows * k) - len(blocks))
    inverse = {slot: r for r, slot in enumerate(plan.order.tolist()) if slot >= 0}
    assert plan.inverse.flatten().tolist() == [inverse.get(s, -1) for s in range(rows * k)]


# ---------------------------------------------------------------- moves and experts against the dense form
def dense_moe(x, weights_ne, w1, b1, w2, b2, activation, w3=None):
    """Every expert on every row, weighted by the dense weights [N, E]."""
    hidden = torch.einsum("nh,efh->nef", x, w1) + b1
    hidden = ACTIVATIONS[activation](hidden)
    if w3 is not None:
        hidden = hidden * torch.einsum("nh,efh->nef", x, w3)
    out = torch.einsum("nef,ehf->neh", hidden, w2) + b2
    return torch.einsum("ne,neh->nh", weights_ne, out)


def expert_parameters(experts, width, hidden, dtype=torch.float64, seed=0, gated=False):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    return [
        draw(experts, hidden, width), draw(experts, hidden), draw(experts, width, hidden), draw(experts, width),
        draw(experts, hidden, width) if gated else None,
    ]  # fmt: skip


CASES = {
    "plain": dict(rows=13, experts=5, k=2),
    "one row": dict(rows=1, experts=4, k=2),
    "k = E": dict(rows=6, experts=3, k=3),
    "all rows to one expert": dict(rows=9, experts=4, k=1, favourite=2),
    "more experts than slots": dict(rows=3, experts=16, k=2),
}


@pytest.mark.parametrize(
    "activation, gated", [("relu", False), ("gelu", False), ("gelu_tanh", False), ("silu", True), ("identity", False)]
)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_mlp_equals_dense(case, activation, gated):
    rows, experts, k = case["rows"], case["experts"], case["k"]
    torch.manual_seed(1)
    logits = torch.randn(rows, experts, dtype=torch.float64)
    logits[:, case.get("favourite", 0)] += 20 if "favourite" in case else 0
    logits.requires_grad_()
    x = torch.randn(rows, 4, dtype=torch.float64, requires_grad=True)
    w1, b1, w2, b2, w3 = expert_parameters(experts, 4, 6, gated=gated)
    inputs = [t for t in (x, logits, w1, b1, w2, b2, w3) if t is not None]
    routing = route_topk(logits, k, score="softmax")
    y = grouped_mlp(
        x, make_plan(routing.ids, experts, block=4), w1, b1, w2, b2, routing.weights, activation=activation, w3=w3
    )
    want = dense_moe(x, dense_weights(routing), w1, b1, w2, b2, activation, w3)
    cotangent = torch.randn_like(y)
    got_grads = torch.autograd.grad((y * cotangent).sum(), inputs, retain_graph=True)
    want_grads = torch.autograd.grad((want * cotangent).sum(), inputs)
    torch.testing.assert_close(y, want, rtol=1e-10, atol=1e-10)
    for got, expected in zip(got_grads, want_grads):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    assert want.abs().max() > 0.01 and want_grads[1].abs().max() > 0
    unused = routing.counts == 0
    assert (got_grads[2][unused] == 0).all()


def test_linear_equals_dense_and_reads_transposed_weights():
    torch.manual_seed(0)
    x = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)  # (E, in, out)
    bias = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    routing = route_topk(torch.randn(7, 4, dtype=torch.float64), 2, score="softmax")
    plan = make_plan(routing.ids, 4)
    y = combine(grouped_linear(dispatch(x, plan), plan, weight.transpose(1, 2), bias), routing.weights, plan)
    want = torch.einsum("ne,neo->no", dense_weights(routing), torch.einsum("ni,eio->neo", x, weight) + bias)
    torch.testing.assert_close(y, want, rtol=1e-10, atol=1e-10)
    for got, expected in zip(
        torch.autograd.grad(y.pow(2).sum(), (x, weight, bias)),
        torch.autograd.grad(want.pow(2).sum(), (x, weight, bias)),
    ):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_dropped_slots_add_nothing_and_give_no_gradient():
    torch.manual_seed(0)
    routing = route_topk(torch.randn(12, 3, dtype=torch.float64), 2)
    plan = make_plan(routing.ids, 3, capacity=4)
    weights = routing.weights.clone().requires_grad_()
    rows = torch.randn(24, 5, dtype=torch.float64)
    rows[plan.offsets[-1] :] = torch.nan  # past the last kept slot: never read
    rows.requires_grad_()
    y = combine(rows, weights, plan)
    kept = plan.inverse >= 0
    assert 0 < kept.sum() < 24 and torch.isfinite(y).all()
    want = (torch.where(kept, weights, 0).unsqueeze(-1) * rows.nan_to_num()[plan.inverse.clamp_min(0).long()]).sum(1)
    torch.testing.assert_close(y, want)
    y.sum().backward()
    assert (weights.grad[~kept] == 0).all() and (weights.grad[kept] != 0).all()
    assert (rows.grad[plan.offsets[-1] :] == 0).all()


def test_gradcheck_of_the_moves():
    torch.manual_seed(0)
    routing = route_topk(torch.randn(5, 4, dtype=torch.float64), 2)
    plan = make_plan(routing.ids, 4, capacity=2)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weights = routing.weights.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: dispatch(x, plan), x)
    assert torch.autograd.gradcheck(lambda x, w: combine(dispatch(x, plan) ** 2, w, plan), (x, weights))
    assert torch.autograd.gradcheck(
        lambda r: combine(r, None, plan), torch.randn(10, 3, dtype=torch.float64, requires_grad=True)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_combine_adds_in_float32(dtype):
    """2048 + 1 + ... + 1: every 1 is lost in a half-precision accumulator, none in float32."""
    k = 64
    rows = torch.ones(k, 1)
    rows[0] = 2048.0
    plan = make_plan(torch.zeros(1, k, dtype=torch.int64), 1)
    total = combine(rows.to(dtype), None, plan)
    assert total.dtype == dtype and total.item() == torch.tensor(2048.0 + k - 1).to(dtype).item()


def test_permuting_tokens_permutes_the_output():
    torch.manual_seed(0)
    x, logits = torch.randn(20, 4, dtype=torch.float64), torch.randn(20, 5, dtype=torch.float64)
    w1, b1, w2, b2, _ = expert_parameters(5, 4, 6)
    shuffle = torch.randperm(20)

    def run(x, logits):
        routing = route_topk(logits, 2)
        return grouped_mlp(x, make_plan(routing.ids, 5), w1, b1, w2, b2, routing.weights)

    torch.testing.assert_close(run(x[shuffle], logits[shuffle]), run(x, logits)[shuffle], rtol=1e-12, atol=1e-12)


def test_same_bits_over_100_runs():
    torch.manual_seed(0)
    x = torch.randn(150, 8, requires_grad=True)
    logits = torch.randn(150, 12, requires_grad=True)
    parameters = [p for p in expert_parameters(12, 8, 16, torch.float32) if p is not None]

    def run():
        routing = route_topk(logits, 3, score="softmax")
        y = grouped_mlp(x, make_plan(routing.ids, 12), *parameters, routing.weights)
        return [y, *torch.autograd.grad(y.pow(2).sum(), [x, logits, *parameters])]

    first = run()
    for _ in range(100):
        assert all(torch.equal(a, b) for a, b in zip(first, run()))


# ---------------------------------------------------------------- noise
def test_noisy_logits():
    z, raw, noise = torch.randn(3, 4), torch.randn(3, 4), torch.randn(3, 4)
    noisy, std = noisy_logits(z, raw, noise=noise)
    torch.testing.assert_close(std, torch.log1p(raw.exp()) + 0.01)
    torch.testing.assert_close(noisy, z + noise * std)
    drawn = [noisy_logits(z, raw, generator=torch.Generator().manual_seed(5))[0] for _ in range(2)]
    assert torch.equal(*drawn) and not torch.equal(drawn[0], noisy)


def test_jitter_multiplies():
    x = torch.full((10_000,), 3.0)
    noisy = jitter(x, 0.1, generator=torch.Generator().manual_seed(0))
    assert 2.7 <= noisy.min() < 2.71 and 3.29 < noisy.max() <= 3.3
    torch.testing.assert_close(
        jitter(torch.tensor([2.0, 2.0]), 0.5, uniform=torch.tensor([0.0, 0.75])), torch.tensor([1.0, 2.5])
    )


def test_second_choice_is_kept_with_probability_2w():
    ids = torch.tensor([[3, 1]] * 4, dtype=torch.int32)
    weights = torch.tensor([[0.8, 0.2]] * 3 + [[0.5, 0.5]])
    kept = drop_second_choice(ids, weights, uniform=torch.tensor([0.39, 0.41, 0.0, 0.999]))
    assert kept.tolist() == [[3, 1], [3, -1], [3, 1], [3, 1]] and kept.dtype == torch.int32


def test_noise_needs_a_source():
    with pytest.raises(ValueError, match="generator"):
        jitter(torch.ones(3))
    with pytest.raises(ValueError, match="noise: expected shape"):
        noisy_logits(torch.ones(2, 3), torch.ones(2, 3), noise=torch.ones(2, 2))


# ---------------------------------------------------------------- bad input
def test_bad_input():
    plan = make_plan(IDS, 4)
    x, w1 = torch.randn(5, 3), torch.randn(4, 6, 3)
    cases = [
        (lambda: make_plan(IDS.float(), 4), "ids: expected int32 or int64"),
        (lambda: make_plan(IDS, 3), r"ids: expected -1 \(dropped\) or an expert in \[0, 3\)"),
        (lambda: make_plan(IDS - 2, 4), r"ids: expected -1"),
        (lambda: make_plan(IDS[0], 4), r"ids: expected \[N, k\]"),
        (lambda: make_plan(IDS, 4, capacity=-1), "capacity: expected an int >= 0"),
        (lambda: make_plan(IDS, 4, order="random"), "order: expected one of"),
        (lambda: make_plan(IDS, 4, skip_zero=torch.ones(5, 3)), "skip_zero: expected the shape"),
        (lambda: expert_capacity(-0.5, 4, 2, 4), "capacity_factor: expected a finite number"),
        (lambda: dispatch(x[:4], plan), r"x: expected \[N, H\] with the 5 rows"),
        (lambda: combine(x, None, plan), r"rows: expected \[M, H\] with the 10 slots"),
        (lambda: combine(torch.randn(10, 3), torch.randn(5, 3), plan), "weights: expected one per slot"),
        (lambda: grouped_mlp(x, plan, w1[:3], None, w1.mT, None, None), r"w1: expected \[4, any, 3\]"),
        (lambda: grouped_mlp(x, plan, w1, None, w1, None, None), r"w2: expected \[4, any, 6\]"),
        (lambda: grouped_mlp(x, plan, w1.double(), None, w1.mT, None, None), "w1: expected torch.float32"),
        (lambda: grouped_mlp(x, plan, w1, None, w1.mT, None, None, activation="tanh"), "activation: expected one of"),
    ]
    for call, message in cases:
        with pytest.raises((ValueError, TypeError), match=message):
            call()
    outside = make_plan(torch.tensor([[7, 0], [-3, 1]]), 2, validate=False)
    assert outside.inverse.tolist() == [[-1, 0], [-1, 1]]
