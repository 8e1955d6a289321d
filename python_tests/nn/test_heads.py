"""Heads: the last linear layer, or the named one, is replaced in place."""

import pytest
import torch
from torch import nn

from kdfast.nn import replace_head


def model():
    return nn.Sequential(nn.Sequential(nn.Linear(4, 5), nn.ReLU()), nn.Linear(5, 3), nn.Flatten())


def test_the_last_linear_layer_is_replaced_in_place():
    net = model()
    assert replace_head(net, lambda head: nn.Linear(head.in_features, 2 * head.out_features)) is net
    assert net(torch.zeros(2, 4)).shape == (2, 6) and net[0][0].out_features == 5


def test_a_named_layer_is_replaced():
    net = replace_head(model(), lambda head: nn.Linear(head.in_features, head.out_features, bias=False), "0.0")
    assert net[0][0].bias is None and net[1].bias is not None


@pytest.mark.parametrize(("net", "path"), [(nn.ReLU(), None), (model(), "0"), (model(), "9"), (nn.Linear(2, 2), None)])
def test_no_linear_layer_there(net, path):
    with pytest.raises(ValueError, match="path: expected an "):
        replace_head(net, lambda head: head, path)
