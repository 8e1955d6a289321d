"""Feature masks: the written-out module, maps, hooks that come and go, sizes that do not fit."""

import pytest
import torch
from torch import nn

from kdfast.nn import FeatureMask, attach_mask


def test_mask_is_the_written_out_module():
    torch.manual_seed(0)
    mask, x = FeatureMask(12, heads=2, factor=3).double(), torch.randn(3, 12, dtype=torch.float64)
    assert mask.hidden == 4
    h = (x @ mask.embed.weight.T + mask.embed.bias).view(3, 12, 4)
    attended, _ = mask.mha(h, h, h)
    want = torch.sigmoid(attended @ mask.fc.weight.T + mask.fc.bias).squeeze(-1)
    torch.testing.assert_close(mask(x), want)
    torch.testing.assert_close(mask.apply_to(x), x * want)


def test_maps_are_reduced_and_masked_at_every_place():
    torch.manual_seed(0)
    mask, x = FeatureMask(12, spatial=True), torch.randn(2, 12, 5, 6)
    got = mask.eval()(x)
    assert got.shape == (2, 12)
    torch.testing.assert_close(mask.apply_to(x), x * got.view(2, 12, 1, 1))
    small = torch.randn(2, 12, 1, 1)
    torch.testing.assert_close(mask(small), mask(small.flatten(1)))
    with pytest.raises(ValueError, match="features: expected vectors, got maps"):
        FeatureMask(12)(x)


def test_a_mask_is_attached_inside_the_block_only():
    torch.manual_seed(0)
    model, mask, x = nn.Sequential(nn.Linear(3, 12), nn.ReLU(), nn.Linear(12, 2)), FeatureMask(12), torch.randn(4, 3)
    plain = model(x)
    with attach_mask(model, "1", mask):
        masked = model(x)
    torch.testing.assert_close(masked, model[2](mask.apply_to(model[1](model[0](x)))))
    assert torch.equal(model(x), plain) and not torch.allclose(masked, plain)
    with pytest.raises(ValueError, match="path: Sequential has no submodule '7'"), attach_mask(model, "7", mask):
        pass


@pytest.mark.parametrize("options", [{"dim": 5}, {"dim": 12, "hidden": 4}, {"dim": 12, "hidden": 0}])
def test_heads_must_divide_the_width(options):
    with pytest.raises(ValueError, match="hidden: expected a multiple of 3 heads"):
        FeatureMask(**options)


def test_another_width_is_refused():
    with pytest.raises(ValueError, match=r"features: expected \[B, 12\]"):
        FeatureMask(12)(torch.zeros(2, 13))
