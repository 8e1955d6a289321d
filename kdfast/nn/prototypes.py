"""Prototypes of token features: learned by soft assignment and residual aggregation, and attended to by other tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdfast._checks import check_float_tensor, check_int
from kdfast._dispatch import debugging

NORM_FLOOR = 1e-12


def soft_vlad(
    tokens: Tensor, prototypes: Tensor, assign_weight: Tensor, assign_bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Residuals to prototypes, softly assigned and summed, as in NetVLAD; (v [B, K D] of length 1, assignment s [B, N, K]).

        x = t / max(||t||, 1e-12);   s_nk = softmax_k(A_k . x_n);   v_k = sum_n s_nk (x_n - c_k) = S^T X - (sum_n s_nk) c_k

    Each v_k is divided by its length, then the whole, K slowest. A zero token is legal and stays zero.

    Args: tokens: t [B, N, D], at least one. prototypes: c [K, D]. assign_weight: A [K, D].
    """
    _check_tokens("tokens", tokens, prototypes.shape[-1])
    x = F.normalize(tokens, dim=-1, eps=NORM_FLOOR)
    s = torch.softmax(F.linear(x, assign_weight, assign_bias), -1)  # [B, N, K]
    v = s.mT @ x - s.sum(1).unsqueeze(-1) * prototypes  # the expanded form: nothing of size [B, K, D, N]
    v = F.normalize(v, dim=-1, eps=NORM_FLOOR).flatten(1)
    return F.normalize(v, dim=-1, eps=NORM_FLOOR), s


def prototype_attention(tokens: Tensor, prototypes: Tensor) -> tuple[Tensor, Tensor]:
    """r_n = sum_k a_kn p_k, a_kn = softmax_k(p_k . e_n) without 1/sqrt(D): keys and values are the prototypes.

    Args: tokens: e [B, N, D]. prototypes: p [K, D]. Returns: (r [B, N, D], a [B, K, N]).
    """
    a = torch.softmax(tokens @ prototypes.T, -1)  # [B, N, K]
    return a @ prototypes, a.mT


class PrototypeLearner(nn.Module):
    """Fits K prototypes on a teacher's tokens: (out [B, N, D], descriptor d [B, D], assignment [B, N, K]).

        t = ReLU(cat([T1; T2; T3]));   d = fc(soft_vlad(t));   out_n = ReLU(W2 ReLU(W1 [t_n; d]))

    Args: dim: D. num_prototypes: K, drawn from uniform(0, 1). teacher_layers: how many token tensors [B, N, D] come in. bias: of
        the pointwise maps (assignment and fusion), None in the release.
    """

    def __init__(self, dim: int, num_prototypes: int = 72, teacher_layers: int = 3, *, bias: bool = False) -> None:
        super().__init__()
        k = check_int("num_prototypes", num_prototypes, low=1)
        self.layers = check_int("teacher_layers", teacher_layers, low=1)
        self.prototypes = nn.Parameter(torch.rand(k, dim))
        self.cat, self.fc = nn.Linear(teacher_layers * dim, dim), nn.Linear(k * dim, dim)
        self.assign = nn.Linear(dim, k, bias=bias)
        self.fuse1, self.fuse2 = nn.Linear(2 * dim, dim, bias=bias), nn.Linear(dim, dim, bias=bias)

    def forward(self, teacher_tokens: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        if len(teacher_tokens) != self.layers:
            raise ValueError(f"teacher_tokens: expected {self.layers} layers, got {len(teacher_tokens)}")
        for i, tokens in enumerate(teacher_tokens):
            _check_tokens(f"teacher_tokens[{i}]", tokens, self.prototypes.shape[1])
            if tokens.shape != teacher_tokens[0].shape:
                shapes = ", ".join(str(tuple(t.shape)) for t in teacher_tokens)
                raise ValueError(f"teacher_tokens: expected as many tokens in every layer, got {shapes}")
        return self.fuse(torch.relu(self.cat(torch.cat(list(teacher_tokens), -1))))

    def fuse(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The module after `cat`: t [B, N, D]."""
        vlad, assignment = soft_vlad(tokens, self.prototypes, self.assign.weight, self.assign.bias)
        descriptor = self.fc(vlad)
        both = torch.cat((tokens, descriptor.unsqueeze(1).expand_as(tokens)), -1)
        return torch.relu(self.fuse2(torch.relu(self.fuse1(both)))), descriptor, assignment


class PrototypeAugment(nn.Module):
    """Enriches tokens with the prototypes they resemble: (out [B, N, D], alignment a [B, K, N]).

        e = E u,  p = E c;   r = prototype_attention(e, p);   out_n = ReLU(ReLU(W2 ReLU(W1 [e_n; r_n])) + u_n)

    Args: dim: D. bias: of E, W1, W2, None in the release.
    """

    def __init__(self, dim: int, *, bias: bool = False) -> None:
        super().__init__()
        self.encode, self.aug1 = nn.Linear(dim, dim, bias=bias), nn.Linear(2 * dim, dim, bias=bias)
        self.aug2 = nn.Linear(dim, dim, bias=bias)

    def forward(self, tokens: Tensor, prototypes: Tensor) -> tuple[Tensor, Tensor]:
        """tokens: u [B, N, D]. prototypes: c [K, D], of a `PrototypeLearner`."""
        _check_tokens("tokens", tokens, self.encode.in_features)
        e = self.encode(tokens)
        r, alignment = prototype_attention(e, self.encode(prototypes))
        added = torch.relu(self.aug2(torch.relu(self.aug1(torch.cat((e, r), -1)))))
        return torch.relu(added + tokens), alignment


def _check_tokens(name: str, tokens: Tensor, width: int) -> None:
    check_float_tensor(name, tokens)
    if tokens.dim() != 3 or tokens.shape[2] != width or not tokens.numel():
        raise ValueError(f"{name}: expected tokens [B, N, {width}], at least one, got shape {tuple(tokens.shape)}")
    if debugging() and not bool(tokens.isfinite().all()):
        raise ValueError(f"{name}: expected finite values, got NaN or infinity")
