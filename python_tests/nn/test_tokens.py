"""Tokens from maps and sequences: order by hand, round trips, errors."""

import pytest
import torch
import torch.nn.functional as F

from kdfast.nn import align_maps, tokenize_feature_map, tokens_to_map


def test_tokenize_by_hand():
    x = torch.arange(2 * 2 * 4.0).reshape(1, 2, 2, 4)  # channel 0: 0..7, channel 1: 8..15
    assert tokenize_feature_map(x)[0, :3].tolist() == [[0, 8], [1, 9], [2, 10]]
    assert tokenize_feature_map(x, 2)[0].tolist() == [[0, 1, 4, 5, 8, 9, 12, 13], [2, 3, 6, 7, 10, 11, 14, 15]]


@pytest.mark.parametrize("patch", [1, 2, 3])
def test_tokenize_is_unfold(patch):
    x = torch.randn(2, 3, 6, 12)
    assert torch.equal(tokenize_feature_map(x, patch), F.unfold(x, patch, stride=patch).mT)


def test_vit_sequence_to_map_and_back():
    x = torch.randn(2, 10, 5)
    maps = tokens_to_map(x)
    assert maps.shape == (2, 5, 3, 3) and torch.equal(maps[:, :, 1, 2], x[:, 1 + 5])
    assert torch.equal(tokenize_feature_map(maps), x[:, 1:])
    assert torch.equal(tokens_to_map(x[:, 1:], class_tokens=0), maps)


def test_align_pools_the_larger():
    a, b = torch.randn(2, 3, 8, 4), torch.randn(2, 7, 4, 4)
    pooled, same = align_maps(a, b)
    assert same is b and torch.equal(pooled, F.avg_pool2d(a, (2, 1)))
    assert align_maps(b, a)[1].shape == (2, 3, 4, 4)


def test_bad_input():
    with pytest.raises(ValueError, match=r"h and w divisible by patch=2, got \(1, 2, 3, 4\)"):
        tokenize_feature_map(torch.zeros(1, 2, 3, 4), 2)
    with pytest.raises(ValueError, match=r"expected \[B, 1 \+ g\^2, D\]"):
        tokens_to_map(torch.zeros(1, 9, 4))
    with pytest.raises(ValueError, match=r"maps \[B, C, h, w\] of one batch size"):
        align_maps(torch.zeros(1, 2, 3, 3), torch.zeros(2, 2, 3, 3))
