"""How far generated samples are from real ones."""

from __future__ import annotations

import torch
from torch import Tensor


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of the Gaussians through two sets of features.

    a [N, D], b [M, D], at least two rows each; computed in float64, 0 for equal sets. The square root's trace is the sum of the
    roots of the eigenvalues of S_a^(1/2) S_b S_a^(1/2), which are real and not negative. With N or M below D the
    covariances are singular and the distance is biased upwards. Source: Heusel et al., 2017 (arXiv 1706.08500), eq. 6.

    >>> frechet_distance(torch.randn(500, 8), torch.randn(500, 8) + 1)   # about 8
    """
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(
            f"a, b: expected features [N, D] and [M, D] of at least two rows, got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    a, b = a.double(), b.double()
    s_a, s_b = torch.cov(a.T).reshape(a.shape[1], -1), torch.cov(b.T).reshape(b.shape[1], -1)
    values, vectors = torch.linalg.eigh(s_a)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ s_b @ root).clamp_min(0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + s_a.trace() + s_b.trace() - 2 * cross
    return max(float(distance), 0.0)
