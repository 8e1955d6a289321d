"""query_attention against its definition, with scale, bias and mask; call_frozen: gradient to the input, none to the weights."""

import pytest
import torch
from torch import nn

from kdfast.nn import MapTransformer, call_frozen, query_attention

F64 = torch.float64


def tensors(b=2, n=5, m=7, d=6):
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(shape, generator=generator, dtype=F64, requires_grad=True)
        for shape in ((b, n, d), (b, m, d), (b, m, d))
    )


def by_definition(q, k, v, heads, scale, bias=None):
    out, width = [], q.shape[2] // heads
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        products = scale * torch.einsum("bnd,bmd->bnm", q[..., part], k[..., part])
        products = products if bias is None else products + bias[:, h]
        out.append(products.softmax(-1) @ v[..., part])
    return torch.cat(out, -1)


@pytest.mark.parametrize("heads", (1, 2, 3, 6))
def test_heads_are_contiguous_slices(heads):
    q, k, v = tensors()
    default = (6 / heads) ** -0.5
    bias = torch.randn(2, heads, 5, 7, dtype=F64)
    for got, want in (
        (query_attention(q, k, v, num_heads=heads), by_definition(q, k, v, heads, default)),
        (query_attention(q, k, v, num_heads=heads, scale=3.0), by_definition(q, k, v, heads, 3.0)),
        (query_attention(q, k, v, num_heads=heads, bias=bias), by_definition(q, k, v, heads, default, bias)),
    ):
        torch.testing.assert_close(got, want)
        weight = torch.randn_like(want)
        grads = [torch.autograd.grad((one * weight).sum(), (q, k, v)) for one in (got, want)]
        torch.testing.assert_close(*grads)


def test_a_mask_hides_keys():
    q, k, v = tensors()
    mask = torch.ones(2, 1, 5, 7, dtype=torch.bool)
    mask[..., 4:] = False
    torch.testing.assert_close(
        query_attention(q, k, v, num_heads=2, bias=mask), query_attention(q, k[:, :4], v[:, :4], num_heads=2)
    )


def test_wrong_arguments():
    q, k, v = tensors()
    for arguments, heads, message in (
        ((q, k, v), 4, "num_heads: expected a divisor of the width 6, got 4"),
        ((q, k[:1], v[:1]), 2, "key: expected tokens .* of one batch size and width"),
        ((q, k, v[:, :3]), 2, "value: expected the shape of key"),
        ((q[0], k, v), 2, "query: expected tokens"),
        ((q, k, v), 0, "num_heads: expected an int >= 1"),
    ):
        with pytest.raises(ValueError, match=message):
            query_attention(*arguments, num_heads=heads)


def test_a_frozen_call_passes_the_gradient_through_and_leaves_the_weights():
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    x = torch.randn(5, 3, dtype=F64, requires_grad=True)
    (want,) = torch.autograd.grad(block(x).square().sum(), x)
    y = call_frozen(block, x)
    torch.testing.assert_close(y, block(x))
    y.square().sum().backward()
    torch.testing.assert_close(x.grad, want)
    assert all(p.grad is None and p.requires_grad for p in block.parameters())


def test_transformer_blocks_on_a_map_are_equivariant_to_its_positions():
    torch.manual_seed(0)
    blocks = MapTransformer(8, 2, heads=2).double()
    maps = torch.randn(2, 8, 3, 3, dtype=F64)
    got = blocks(maps)
    assert got.shape == maps.shape
    torch.testing.assert_close(blocks(maps.flip(2)), got.flip(2))
    assert not torch.allclose(blocks(maps[:, :, :2, :2]), got[:, :, :2, :2])
