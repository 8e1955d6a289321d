"""How far a result may be from the truth: an error budget for every element, instead of a tolerance per test.

The truth is the reference in float64 on the same (exactly upcast) inputs. A kernel may be as wrong as the reference is
in its own dtype, plus a small floor for what is luck there (an element the reference happens to hit exactly):

    |got - truth|  <=  |reference - truth| + relative |truth| + absolute max |truth|

The floors below are a few roundings of the result's dtype. A test that needs a larger one passes `floor` with the reason
and the measurement beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# dtype of the result -> (relative to the element, absolute as a share of the largest element). One rounding is half an
# eps: 1.2e-7, 2.2e-16, 7.8e-3, 9.8e-4. Half-precision gradients are computed in float32 and rounded once.
FLOORS: dict[torch.dtype, tuple[float, float]] = {
    torch.float32: (1e-6, 2.5e-7),
    torch.float64: (2e-15, 5e-16),
    torch.bfloat16: (8e-3, 2.5e-7),
    torch.float16: (1e-3, 2.5e-7),
}
# Below the smallest normal number a dtype has no relative precision: float16 gradients are often there.
SMALLEST = {torch.float16: 6e-8, torch.bfloat16: 1e-40, torch.float32: 1e-45, torch.float64: 0.0}


def assert_within_budget(
    got: Tensor,
    want64: Tensor,
    reference_same_dtype: Tensor,
    *,
    floor: tuple[float, float] | None = None,
    name: str = "result",
    allow_zero: bool = False,
) -> None:
    """`got` against the float64 truth, element by element; infinities and NaN must stand in the same places.

    A truth that is zero everywhere agrees with any bug that returns zeros, so it is refused unless `allow_zero`.
    """
    assert got.shape == want64.shape == reference_same_dtype.shape, (
        f"{name}: shapes {tuple(got.shape)}, {tuple(want64.shape)}, {tuple(reference_same_dtype.shape)} differ"
    )
    assert got.dtype == reference_same_dtype.dtype, f"{name}: dtype {got.dtype}, reference {reference_same_dtype.dtype}"
    assert want64.dtype == torch.float64, f"{name}: the truth must be float64, got {want64.dtype}"
    value, truth, reference = got.detach().double(), want64.detach(), reference_same_dtype.detach().double()
    finite = truth.isfinite()
    # A float16 gradient may overflow where the float64 truth does not; then the reference of that dtype decides.
    finite &= reference.isfinite()
    expected = torch.where(truth.isfinite(), reference, truth)
    same = (value == expected) | (value.isnan() & expected.isnan())
    assert bool(same[~finite].all()), (
        f"{name}: expected {expected[~finite & ~same][:4].tolist()}, got {value[~finite & ~same][:4].tolist()}"
    )
    if truth.numel() == 0:
        return
    kept = torch.where(finite, truth, 0.0)
    assert allow_zero or bool((kept != 0).any()), f"{name}: every expected value is zero, the comparison says nothing"
    relative, absolute = FLOORS[got.dtype] if floor is None else floor
    budget = (reference - truth).abs() + relative * kept.abs() + absolute * kept.abs().max() + SMALLEST[got.dtype]
    error = (value - truth).abs()
    over = torch.where(finite, error - budget, -1.0)
    # `not (error <= budget)` rather than `error > budget`: a NaN where the truth is finite must fail.
    bad = finite & ~(error <= budget)
    if bool(bad.any()):
        worst = int(torch.where(bad, over.nan_to_num(nan=float("inf")), -1.0).argmax())
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), truth.shape))
        raise AssertionError(
            f"{name}: {int(bad.sum())} of {bad.numel()} elements over budget; worst at {index}: got {value[index]:.9g}, "
            f"truth {truth[index]:.9g}, reference in {got.dtype} {reference[index]:.9g}, error {error[index]:.3g}, "
            f"budget {budget[index]:.3g}"
        )


def check_against_reference(
    fused: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Sequence[Tensor],
    *,
    seed: int = 0,
    floor: tuple[float, float] | None = None,
    gradient_floor: tuple[float, float] | None = None,
    allow_zero: bool = False,
) -> None:
    """Every float output and every gradient of `fused(*inputs)` within the budget of `reference(*inputs)`.

    The upstream gradients are random, not one. Inputs with requires_grad are differentiated; integers pass through.
    """
    got, got_grads = _values_and_gradients(fused, inputs, None, seed)
    same, same_grads = _values_and_gradients(reference, inputs, None, seed)
    truth, truth_grads = _values_and_gradients(reference, inputs, torch.float64, seed)
    assert len(got) == len(same)
    for i, (g, t, s) in enumerate(zip(got, truth, same)):
        assert_within_budget(g, t, s, floor=floor, name=f"output {i}", allow_zero=allow_zero)
    for i, (g, t, s) in enumerate(zip(got_grads, truth_grads, same_grads)):
        assert_within_budget(g, t, s, floor=gradient_floor or floor, name=f"gradient {i}", allow_zero=allow_zero)


def float_outputs(result: Any) -> list[Tensor]:
    """The float tensors of a tensor, tuple or NamedTuple (integer outputs have no error)."""
    flat = result if isinstance(result, tuple) else (result,)
    return [t for t in flat if isinstance(t, Tensor) and t.is_floating_point()]


def _values_and_gradients(function, inputs, dtype, seed) -> tuple[list[Tensor], list[Tensor]]:
    leaves = []
    for tensor in inputs:
        leaf = tensor.detach()
        if dtype is not None and leaf.is_floating_point():
            leaf = leaf.to(dtype)
        leaves.append(leaf.requires_grad_(tensor.requires_grad))
    outputs = float_outputs(function(*leaves))
    asked = [leaf for leaf in leaves if leaf.requires_grad]
    if not asked:
        return outputs, []
    generator = torch.Generator().manual_seed(seed)
    # float32 numbers are exact in float64, so all three runs see the same upstream gradients
    upstream = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs]
    pairs = [(o, u) for o, u in zip(outputs, upstream) if o.requires_grad]
    grads = torch.autograd.grad([o for o, _ in pairs], asked, [u for _, u in pairs])
    return outputs, list(grads)
