"""The convolution that small networks are made of."""

from __future__ import annotations

from torch import nn


def conv_block(before: int, after: int, stride: int = 1, kernel: int = 3) -> nn.Sequential:
    """Convolution without bias, batch norm, ReLU; at stride 1 and an odd kernel the map keeps its size."""
    convolution = nn.Conv2d(before, after, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(after), nn.ReLU())
