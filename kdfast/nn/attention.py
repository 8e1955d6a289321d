"""Attention of queries to the tokens of something else, and what of it is the same everywhere: the heads."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kdfast._checks import check_float_tensor, check_int


def query_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    num_heads: int,
    scale: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """softmax(scale q k^T + bias) v in each head, the heads contiguous slices of the width: [B, N, D].

    Args:
        query: [B, N, D], projected. key, value: [B, M, D], projected. scale: None is (D / num_heads)^-1/2.
        bias: added before the softmax, broadcast to [B, num_heads, N, M]; or bool, True = attend.

    torch's fused attention where it has one: no [B, num_heads, N, M] table is kept.

    >>> query_attention(torch.randn(2, 49, 64), torch.randn(2, 196, 64), torch.randn(2, 196, 64), num_heads=8).shape
    torch.Size([2, 49, 64])
    """
    check_int("num_heads", num_heads, low=1)
    for name, tokens in (("query", query), ("key", key), ("value", value)):
        check_float_tensor(name, tokens)
        if tokens.dim() != 3 or tokens.shape[0] != query.shape[0] or tokens.shape[2] != query.shape[2]:
            raise ValueError(
                f"{name}: expected tokens [B, N, D] of one batch size and width, got {tuple(tokens.shape)} beside query {tuple(query.shape)}"
            )
    if key.shape != value.shape:
        raise ValueError(f"value: expected the shape of key {tuple(key.shape)}, got {tuple(value.shape)}")
    if query.shape[2] % num_heads:
        raise ValueError(f"num_heads: expected a divisor of the width {query.shape[2]}, got {num_heads}")
    q, k, v = (tokens.unflatten(-1, (num_heads, -1)).transpose(1, 2) for tokens in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale).transpose(1, 2).flatten(2)
