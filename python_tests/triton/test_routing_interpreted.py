"""The routing kernels under Triton's interpreter: the CPU kernels' own tests, and what is special here."""

from __future__ import annotations

import math

import pytest
import torch
from triton_mode import only, round_as_a_gpu, take_the_cpu

only("interpreted")

from ops import test_routing as scores  # noqa: E402
from ops import test_routing_fused as fused  # noqa: E402
from ops import test_routing_plan as plans  # noqa: E402

from kdfast.ops import combine, dispatch, make_plan, route_topk, routing, routing_plan  # noqa: E402
from kdfast.triton import launch  # noqa: E402
from kdfast.triton import routing as kernels  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of infinities in masked lanes
round_as_a_gpu()
take_the_cpu(routing, {"_scores_op": kernels.scores, "_scores_backward_op": kernels.scores_backward})
take_the_cpu(
    routing_plan,
    {
        "_plan_op": kernels.plan, "_gather_op": kernels.gather, "_combine_op": kernels.combine,
        "_combine_backward_op": kernels.combine_backward,
    },
)  # fmt: skip

# Here "cpu" is the Triton kernel. Left out: grouped products, threads, torch's modes, and what reads values.
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
test_moves_within_budget = fused.test_moves_within_budget
test_choice_equals_the_reference = fused.test_choice_equals_the_reference
test_plan_equals_the_reference = fused.test_plan_equals_the_reference
test_plan_by_hand = plans.test_plan_by_hand
test_capacity_in_token_and_choice_order = plans.test_capacity_in_token_and_choice_order
test_dropped_slots_and_repeats = plans.test_dropped_slots_and_repeats
test_zero_weights_can_be_left_out = plans.test_zero_weights_can_be_left_out
test_dropped_slots_add_nothing_and_give_no_gradient = plans.test_dropped_slots_add_nothing_and_give_no_gradient
test_combine_adds_in_float32 = plans.test_combine_adds_in_float32


def test_these_tests_run_triton_kernels():
    logits = torch.randn(6, 8)
    with launch.recording() as launches:
        route_topk(logits, 2)
    assert len(launches) == 2
    ids = torch.randint(8, (6, 2))
    for order, count in (("token", 5), ("choice", 8)):
        with launch.recording() as launches:
            make_plan(ids, 8, order=order)
        assert len(launches) == count
    plan = make_plan(ids, 8)
    with launch.recording() as launches:
        combine(dispatch(logits, plan), None, plan)
    assert len(launches) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_row_gets_nan_weights_and_distinct_ids_with_nan_last(bad, dtype):
    logits = torch.randn(3, 6, dtype=dtype)
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


def test_plans_of_several_blocks_and_the_same_bits_again():
    ids = torch.randint(-1, 40, (500, 3), generator=torch.Generator().manual_seed(0))
    for options in ({}, {"capacity": 20}, {"capacity": 20, "order": "choice"}):
        got, again = make_plan(ids, 40, **options), make_plan(ids, 40, **options)
        want = make_plan(ids, 40, backend="reference", **options)
        for a, b, c in zip(got[:-1], want[:-1], again[:-1]):
            assert torch.equal(a, b) and torch.equal(a, c)
