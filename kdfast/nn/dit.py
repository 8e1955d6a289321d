"""A diffusion Transformer for small images: patches as tokens, blocks modulated by the condition (adaLN-Zero), as in DiT.

Peebles and Xie, Scalable Diffusion Models with Transformers, 2023 (arXiv 2212.09748). B batch, L tokens, H width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdfast.nn.attention import query_attention


def modulate(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """h (1 + scale) + shift; h [B, L, H], shift and scale [B, H]."""
    return h * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def sinusoid(positions: Tensor, width: int, max_period: float = 10_000.0) -> Tensor:
    """[cos(p f) | sin(p f)] with width / 2 frequencies f from 1 down to 1 / max_period; positions [...] -> [..., width]."""
    half = width // 2
    frequencies = torch.exp(
        -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=positions.device) / half
    )
    angles = positions.float().unsqueeze(-1) * frequencies
    return torch.cat((angles.cos(), angles.sin()), -1)


def grid_positions(side: int, width: int) -> Tensor:
    """Fixed 2-D sine-cosine positions of a side x side grid, [side^2, width]: half the features for each axis."""
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.cat((sinusoid(row.flatten(), width // 2), sinusoid(column.flatten(), width // 2)), -1)


class TimestepTable(nn.Module):
    """Embeddings of ALL timesteps, [T, H]: sinusoid -> Linear -> SiLU -> Linear."""

    def __init__(self, num_timesteps: int, width: int, frequencies: int = 256) -> None:
        super().__init__()
        self.register_buffer("waves", sinusoid(torch.arange(num_timesteps), frequencies), persistent=False)
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self) -> Tensor:
        return self.mlp(self.waves)


class DiTBlock(nn.Module):
    """z + a1 Attn(mod(LN z)), then z + a2 MLP(mod(LN z)); shift, scale and a from the condition, zero at the start."""

    def __init__(self, width: int, heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        hidden = int(width * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))
        self.condition = nn.Sequential(nn.SiLU(), _zeros(nn.Linear(width, 6 * width)))

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        """z [B, L, H], c [B, H] -> [B, L, H]."""
        s1, c1, a1, s2, c2, a2 = self.condition(c).chunk(6, -1)
        z = z + a1.unsqueeze(1) * self.attention(modulate(_norm(z), s1, c1))
        return z + a2.unsqueeze(1) * self.mlp(modulate(_norm(z), s2, c2))

    def attention(self, h: Tensor) -> Tensor:
        return self.project(query_attention(*self.qkv(h).chunk(3, -1), num_heads=self.heads))


class DiTHead(nn.Module):
    """Modulated LayerNorm, then a zero-initialised Linear to the pixels of each patch."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.condition = nn.Sequential(nn.SiLU(), _zeros(nn.Linear(width, 2 * width)))
        self.linear = _zeros(nn.Linear(width, outputs))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.condition(c).chunk(2, -1)
        return self.linear(modulate(_norm(x), shift, scale))


def _zeros(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _norm(h: Tensor) -> Tensor:
    return F.layer_norm(h, h.shape[-1:], eps=1e-6)


def patchify(images: Tensor, patch: int) -> Tensor:
    """[B, C, S, S] -> [B, (S / patch)^2, C patch^2]."""
    size = images.shape[-1]
    if images.dim() != 4 or images.shape[-2] != size or size % patch:
        raise ValueError(
            f"images: expected [B, C, S, S] with S a multiple of the patch ({patch}), got {tuple(images.shape)}"
        )
    return F.unfold(images, patch, stride=patch).transpose(1, 2)


def unpatchify(tokens: Tensor, patch: int) -> Tensor:
    """The inverse of `patchify`; the tokens must form a square grid."""
    side = math.isqrt(tokens.shape[1])
    if side * side != tokens.shape[1]:
        raise ValueError(f"tokens: expected a square grid, got {tokens.shape[1]} tokens")
    return F.fold(tokens.transpose(1, 2), side * patch, patch, stride=patch)
