"""evaluating: every module gets back the mode it had, after an error too; conv_block: shapes."""

import pytest
import torch
from torch import nn

from kdfast.nn import conv_block, evaluating


def test_each_module_is_in_its_own_mode_again():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm1d(3)))
    model[1].eval()
    with pytest.raises(KeyError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert model.training and model[0].training and not model[1].training and not model[1][0].training


def test_conv_block_keeps_or_halves_the_size():
    x = torch.randn(2, 3, 8, 8)
    assert conv_block(3, 5)(x).shape == conv_block(3, 5, kernel=1)(x).shape == (2, 5, 8, 8)
    halved = conv_block(3, 5, 2)
    assert halved(x).shape == (2, 5, 4, 4) and halved[0].bias is None and (halved(x) >= 0).all()
