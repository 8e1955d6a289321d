"""The selective kernels under Triton's interpreter: the CPU kernel's own tests, and what is special here."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_mode import only, round_as_a_gpu, take_the_cpu

only("interpreted")

from ops import test_selective as cpu  # noqa: E402

from kdfast.ops import selective, selective_kl, selective_kl_reference  # noqa: E402
from kdfast.triton import launch  # noqa: E402
from kdfast.triton import selective as kernels  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of infinities in masked lanes
round_as_a_gpu()
take_the_cpu(selective, {"_op": kernels.selective_kl})

# Here "cpu" is the Triton kernel. Left out: what reads values or counts threads, torch's modes, and bad input.
test_by_hand = cpu.test_by_hand
test_closed_form = cpu.test_closed_form
test_entropy_reliability = cpu.test_entropy_reliability
test_swapping_the_models_swaps_the_result = cpu.test_swapping_the_models_swaps_the_result
test_shift_of_the_logits_of_a_pixel_changes_nothing = cpu.test_shift_of_the_logits_of_a_pixel_changes_nothing
test_ties_move_nothing_and_counts_add_up = cpu.test_ties_move_nothing_and_counts_add_up
test_no_valid_pixel_gives_exact_zeros = cpu.test_no_valid_pixel_gives_exact_zeros
test_ignored_pixels_may_hold_anything = cpu.test_ignored_pixels_may_hold_anything
test_single_minus_infinities_are_legal = cpu.test_single_minus_infinities_are_legal
test_any_number_of_axes_and_odd_sizes = cpu.test_any_number_of_axes_and_odd_sizes
test_empty = cpu.test_empty
test_strides_are_read_in_place = cpu.test_strides_are_read_in_place
test_label_dtypes_and_strides = cpu.test_label_dtypes_and_strides
test_error_budget_against_float64 = cpu.test_error_budget_against_float64
test_small_losses_keep_their_digits = cpu.test_small_losses_keep_their_digits
test_two_dtypes = cpu.test_two_dtypes
test_float16_gradients_survive_a_large_map_under_a_loss_scaler = (
    cpu.test_float16_gradients_survive_a_large_map_under_a_loss_scaler
)
test_upstream_factors_two_backwards_and_two_losses = cpu.test_upstream_factors_two_backwards_and_two_losses
test_one_model_frozen = cpu.test_one_model_frozen


@pytest.mark.parametrize(("normalizer", "count"), [("valid", 5), ("selected", 4), ("all", 2)])
def test_these_tests_run_triton_kernels(normalizer, count):
    """Launches: count, main and totals, a repair for each gradient; selected: main and totals twice."""
    a, b, labels = cpu.maps(dtype=torch.float32)
    with launch.recording() as launches:
        selective_kl(a, b, labels, normalizer=normalizer, backend="cpu")
    assert len(launches) == count


@pytest.mark.parametrize("normalizer", ["valid", "selected", "all"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_pixel_of_only_minus_infinity_does_not_count(normalizer, dtype):
    """The count of labels guessed Z = 24 where it is 22: the stored gradients are repaired."""
    a, b, labels = cpu.maps((1, 4, 4, 6), ignored=0.0, dtype=dtype)
    with torch.no_grad():
        a[0, :, 0, 1] = -math.inf
        b[0, :, 1, 2] = -math.inf
    out = selective_kl(a, b, labels, normalizer=normalizer, backend="cpu")
    want = selective_kl(a, b, labels, normalizer=normalizer, backend="reference")
    assert (
        int(out.num_valid) == 22 and torch.equal(out.valid, want.valid) and torch.equal(out.direction, want.direction)
    )
    close = {"rtol": 2e-2 if dtype in (torch.bfloat16, torch.float16) else 1e-5, "atol": 1e-6}
    torch.testing.assert_close(torch.stack(out[:2]), torch.stack(want[:2]), **close)
    for got, wanted in zip(
        torch.autograd.grad(out.loss_to_a + out.loss_to_b, (a, b)),
        torch.autograd.grad(want.loss_to_a + want.loss_to_b, (a, b)),
    ):
        torch.testing.assert_close(got, wanted, **close)
        assert got.isfinite().all() and got.abs().max() > 0.01


@pytest.mark.parametrize("reliability", ["label", "entropy"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_classes_of_several_tiles(reliability, temperature, monkeypatch):
    monkeypatch.setattr(launch, "TILE", 256)
    a, b, labels = cpu.maps((2, 50, 3, 13))
    options = {"reliability": reliability, "temperature": temperature}
    with launch.recording() as launches:
        selective_kl(a, b, labels, backend="cpu")
    assert not launches[1].arguments["SINGLE"]
    out, want = (selective_kl(a, b, labels, **options, backend=name) for name in ("cpu", "reference"))
    assert torch.equal(out.direction, want.direction)
    for i in (0, 1, 4, 5):
        torch.testing.assert_close(out[i], want[i], rtol=1e-11, atol=1e-13)
    for got, wanted in zip(
        torch.autograd.grad(out.loss_to_a + out.loss_to_b, (a, b)),
        torch.autograd.grad(want.loss_to_a + want.loss_to_b, (a, b)),
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("tile", [4096, 32])
@pytest.mark.parametrize("value", [math.nan, math.inf, "label"])
def test_nan_in_and_labels_out_of_range_give_nan(value, tile, monkeypatch):
    monkeypatch.setattr(launch, "TILE", tile)
    a, b, labels = cpu.maps((1, 5, 2, 2), ignored=0.0)
    with torch.no_grad():
        if value == "label":
            labels[0, 1, 1] = 10**12  # addresses nothing
        else:
            b[0, 4, 1, 1] = value
    out = kernels.selective_kl(a.detach(), b.detach(), labels, 1.0, 255, "valid", "label", 1.0, True, True)
    assert out[0].isnan() and out[1].isnan() and out[4][0, 1, 1].isnan() and out[2][0, 1, 1] == 0
    assert out[7][0, :, 1, 1].isnan().all() and out[7][0, :, 0].isfinite().all()


@settings(max_examples=10)
@given(
    classes=st.integers(2, 40), height=st.integers(1, 3), width=st.integers(1, 37), scale=st.sampled_from([1e-6, 1.0, 30.0, 3e4]),
    temperature=st.sampled_from([0.3, 1.0, 5.0]), normalizer=st.sampled_from(["valid", "selected", "all"]),
    reliability=st.sampled_from(["label", "entropy"]), ignored=st.sampled_from([0.0, 0.5, 1.0]), holes=st.booleans(),
    tile=st.sampled_from([64, 4096]), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_any_shape_and_extreme_logits(
    classes, height, width, scale, temperature, normalizer, reliability, ignored, holes, tile, seed
):
    a, b, labels = cpu.maps((2, classes, height, width), scale=scale, seed=seed, ignored=ignored)
    if holes:
        with torch.no_grad():
            a[torch.rand(a.shape, generator=torch.Generator().manual_seed(seed)) < 0.3] = -math.inf
    options = {"temperature": temperature, "normalizer": normalizer, "reliability": reliability}
    before, launch.TILE = launch.TILE, tile
    try:
        out = selective_kl(a, b, labels, backend="cpu", **options)
    finally:
        launch.TILE = before
    grads = torch.autograd.grad(out.loss_to_a + out.loss_to_b, (a, b))
    assert all(g.isfinite().all() for g in grads) and min(out.loss_to_a, out.loss_to_b) >= 0
    want = selective_kl_reference(a.detach(), b.detach(), labels, **options)
    tie = (want.reliability_a - want.reliability_b).abs() <= 1e-9 * (1 + want.reliability_a.abs())
    assert torch.equal(out.direction[~tie], want.direction[~tie])
    if torch.equal(out.direction, want.direction):
        torch.testing.assert_close(torch.stack(out[:2]).detach(), torch.stack(want[:2]), rtol=1e-9, atol=1e-12)
