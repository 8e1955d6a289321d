"""The CUDA routing kernels in the emulator: the CPU kernels' own tests, and what is special here."""

from __future__ import annotations

import math

import pytest
import torch
from cuda_emulation import emulated, take_the_cpu
from ops import test_routing as scores
from ops import test_routing_fused as fused
from ops import test_routing_plan as plans

from kdfast.cuda import routing as kernels
from kdfast.ops import make_plan, route_topk, routing, routing_plan


@pytest.fixture(scope="module", autouse=True)
def cuda():
    with pytest.MonkeyPatch.context() as patch:
        take_the_cpu(patch, routing, kernels, {"_scores_op": "scores", "_scores_backward_op": "scores_backward"})
        take_the_cpu(patch, routing_plan, kernels, {"_plan_op": "plan"})
        yield emulated()


# Here "cpu" is the CUDA kernel. Left out: moves and grouped products, threads, torch's modes, and what reads values.
test_softmax_after_topk_by_hand = scores.test_softmax_after_topk_by_hand
test_softmax_raw_weights_are_the_probabilities = scores.test_softmax_raw_weights_are_the_probabilities
test_softmax_normalised_equals_softmax_after_topk = scores.test_softmax_normalised_equals_softmax_after_topk
test_normalised_weights_do_not_underflow = scores.test_normalised_weights_do_not_underflow
test_p_norm = scores.test_p_norm
test_ties_go_to_the_lower_id = scores.test_ties_go_to_the_lower_id
test_underflowed_probabilities_tie = scores.test_underflowed_probabilities_tie
test_masked_expert_has_weight_zero_when_it_must_be_chosen = (
    scores.test_masked_expert_has_weight_zero_when_it_must_be_chosen
)
test_bias_selects_and_does_not_weigh = scores.test_bias_selects_and_does_not_weigh
test_group_limit_by_hand = scores.test_group_limit_by_hand
test_filler_from_a_closed_group_has_weight_zero = scores.test_filler_from_a_closed_group_has_weight_zero
test_mask_rows_are_not_read = scores.test_mask_rows_are_not_read
test_gradient_equals_the_module_equation = scores.test_gradient_equals_the_module_equation
test_scores_within_budget = fused.test_scores_within_budget
test_choice_equals_the_reference = fused.test_choice_equals_the_reference
test_plan_equals_the_reference = fused.test_plan_equals_the_reference
test_plan_by_hand = plans.test_plan_by_hand
test_capacity_in_token_and_choice_order = plans.test_capacity_in_token_and_choice_order
test_dropped_slots_and_repeats = plans.test_dropped_slots_and_repeats
test_zero_weights_can_be_left_out = plans.test_zero_weights_can_be_left_out


def test_each_op_is_one_launch(cuda):
    logits = torch.randn(6, 8, requires_grad=True)
    before = cuda.launches()
    out = route_topk(logits, 2, validate=False)
    assert cuda.launches() == before + 1
    out.weights.sum().backward()
    assert cuda.launches() == before + 2
    for order in ("token", "choice"):
        make_plan(out.ids, 8, order=order, validate=False)
    assert cuda.launches() == before + 4


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_row_gets_nan_weights_and_distinct_ids_with_nan_last(bad):
    logits = torch.randn(3, 6)
    logits[1, :4] = bad
    if bad == -math.inf:
        logits[1] = bad
    out = route_topk(logits, 4, validate=False)
    assert out.weights[1].isnan().all() and out.lse[1].isnan() and out.weights[::2].isfinite().all()
    assert out.ids[1].unique().numel() == 4 and bool(((out.ids >= 0) & (out.ids < 6)).all())
    if bad != bad:
        assert set(out.ids[1, :2].tolist()) == {4, 5} and out.ids[1, 2:].tolist() == [0, 1]
    want = route_topk(logits, 4, validate=False, backend="reference")
    assert torch.equal(out.ids, want.ids) and torch.equal(out.counts, want.counts)


@pytest.mark.parametrize("experts", [5, 32, 64, 100, 256, 512])
def test_ids_of_wide_rows_and_every_bit_in_any_order_of_the_threads(cuda, experts):
    generator = torch.Generator().manual_seed(experts)
    logits = torch.randn(75, experts, generator=generator).round(decimals=1)  # many ties
    options = {
        "score": "sigmoid",
        "normalise": 1.0,
        "bias": torch.randn(experts, generator=generator).round(decimals=1),
    }
    if experts % 4 == 0:
        options |= {"groups": 4, "topk_groups": 2}
    k = min(experts // 2, 40)  # more than a lane each
    want = route_topk(logits.double(), k, validate=False, backend="reference", **options)
    results = []
    for order in (0, 1, 2):
        cuda.set_order(order)
        got = route_topk(logits, k, validate=False, **options)
        results.append(got)
        assert torch.equal(got.counts, want.counts)
        assert (got.weights - want.weights).abs().max() < 2e-6
        assert (got.mean_probs - want.mean_probs).abs().max() < 2e-6
        assert all(torch.equal(a, b) for a, b in zip(got, results[0]))
    cuda.set_order(0)


def test_plans_of_several_blocks_and_the_same_bits_in_any_order_of_the_threads(cuda):
    ids = torch.randint(-1, 40, (1500, 3), generator=torch.Generator().manual_seed(0))
    for options in ({}, {"capacity": 60}, {"capacity": 60, "order": "choice"}):
        want = make_plan(ids, 40, backend="reference", **options)
        for order in (0, 1, 2):
            cuda.set_order(order)
            got = make_plan(ids, 40, validate=False, **options)
            assert all(torch.equal(a, b) for a, b in zip(got[:-1], want[:-1]))
    cuda.set_order(0)


def test_ids_beyond_int32_are_bad_ids_not_addresses():
    ids = torch.tensor([[2**40, 1], [-5, 0]])
    plan = make_plan(ids, 2, validate=False)
    assert plan.counts.tolist() == [1, 1] and plan.inverse.tolist() == [[-1, 1], [-1, 0]]


def test_backend_cuda_reaches_the_ops_that_have_kernels(monkeypatch):
    """On a GPU the ops' last argument decides between the CUDA and the Triton functions (kdfast.triton.register)."""
    seen = []

    def watch(module, name):
        plain = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: seen.append((name, args[-1])) or plain(*args[:-1]))

    for module, name in ((routing, "_scores_op"), (routing, "_scores_backward_op"), (routing_plan, "_plan_op")):
        watch(module, name)
    for module in (routing, routing_plan):
        monkeypatch.setattr(module, "cuda_reason", lambda op, *tensors: None)
        monkeypatch.setattr(module, "MOST_EXPERTS", 512)
    out = route_topk(torch.randn(6, 8, requires_grad=True), 2, validate=False, backend="cuda")
    out.weights[:, 0].sum().backward()
    make_plan(out.ids, 8, validate=False, backend="cuda")
    assert seen == [("_scores_op", True), ("_scores_backward_op", True), ("_plan_op", True)]
    with pytest.raises(ValueError, match="at most 512 experts, got 600"):
        route_topk(torch.randn(2, 600), 2, validate=False, backend="cuda")
    with pytest.raises(ValueError, match="float64"):
        route_topk(torch.randn(2, 6, dtype=torch.float64), 2, validate=False, backend="cuda")
