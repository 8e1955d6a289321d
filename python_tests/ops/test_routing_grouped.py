"""One product of torch for all experts: what a GPU runs, here on the CPU, where torch has it too (as a loop)."""

import pytest
import torch

from kdfast.ops import grouped_linear, make_plan
from kdfast.ops import routing_grouped as grouped
from kdfast.ops.routing_experts import grouped_linear_reference, grouped_mlp_at_once, grouped_mlp_reference

needs_grouped = pytest.mark.skipif(grouped._grouped_mm is None, reason="this torch has no grouped_mm")


def problem(dtype=torch.float32):
    """Expert 1 has no rows, and three slots are dropped: the product leaves both places unwritten."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([[0, 3], [3, -1], [2, 0], [-1, 3], [0, -1]])
    x, w1, b1 = (torch.randn(*s, generator=generator) for s in ((5, 8), (4, 16, 8), (4, 16)))
    w2, b2, w3 = (torch.randn(*s, generator=generator) for s in ((4, 8, 16), (4, 8), (4, 16, 8)))
    leaves = [t.to(dtype).requires_grad_() for t in (x, w1, b1, w2, b2, w3)]
    return make_plan(ids, 4), leaves, torch.rand(5, 2, generator=generator).requires_grad_()


def compare(fused, reference, inputs):
    """torch's grouped product has no float64, so the reference in float32 is the measure."""
    got, want = fused(*inputs), reference(*inputs)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(want.shape, generator=torch.Generator().manual_seed(2))
    for a, b in zip(torch.autograd.grad(got, inputs, upstream), torch.autograd.grad(want, inputs, upstream)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert b.abs().max() > 0.1


@needs_grouped
@pytest.mark.parametrize("biased", [True, False])
def test_linear_is_that_of_the_reference(biased):
    plan, (_, weight, bias, *_), _ = problem()
    rows = torch.randn(10, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    compare(
        lambda r, *w: grouped.grouped_linear_at_once(r, plan, *w),
        lambda r, *w: grouped_linear_reference(r, plan, *w),
        (rows, weight, bias) if biased else (rows, weight),
    )


@needs_grouped
def test_gated_mlp_is_that_of_the_reference():
    plan, leaves, weights = problem()

    def through(function):
        return lambda x, w1, b1, w2, b2, w3, w: function(x, plan, w1, b1, w2, b2, w, activation="silu", w3=w3)

    compare(through(grouped_mlp_at_once), through(grouped_mlp_reference), (*leaves, weights))


def test_the_reasons_against_it():
    rows, weight = (torch.empty(*s, dtype=torch.bfloat16) for s in ((10, 8), (4, 16, 8)))
    assert "takes bfloat16, got torch.float32" in grouped.grouped_reason(rows.float(), weight)
    assert "multiples of 8" in grouped.grouped_reason(rows, weight[:, :12])
    assert "contiguous experts" in grouped.grouped_reason(rows, torch.cat((weight, weight), 2)[..., ::2])
    plan, (_, weight, *_), _ = problem()
    with pytest.raises(ValueError, match="backend='triton' cannot run these inputs: the tensors are on cpu"):
        grouped_linear(torch.zeros(10, 8), plan, weight, backend="triton")
