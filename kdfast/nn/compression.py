"""Learned compression of feature maps: generalised divisive normalisation, and a factorised prior with its tables.

Sources: Balle, Minnen, Singh, Hwang, Johnston, Variational image compression with a scale hyperprior, 2018, https://arxiv.org/abs/1802.01436,
appendix 6.1 (the prior), and https://arxiv.org/abs/1912.08771 (GDN without squares); options and initial values as in CompressAI at
869a9f5. Symbols: y [B, C, ...] latent; q [C, 1, 3] left tail, median m, right tail; M_i, b_i, a_i of each channel, f = (1, 3, 3, 3, 3, 1).

    y_hat = y + U(-1/2, 1/2) in training,  round(y - m) + m (half to even) in evaluation
    s(v):  t = v;  t = softplus(M_i) t + b_i;  t = t + tanh(a_i) tanh(t) but for the last i         increasing in v
    p(y_hat) = sigmoid(s(y_hat + 1/2)) - sigmoid(s(y_hat - 1/2)),  at least 1e-9
    A = sum over c, k of |s(q_ck) - target_k|,  target = (-L, 0, L),  L = log(2 / tail_mass - 1)    learns q alone
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kdfast._checks import check_float_tensor, check_int, check_number
from kdfast._library import compute_dtype
from kdfast.nn import entropy_coding
from kdfast.nn.buffers import ResizedBuffers

CHUNK = 1 << 14  # positions of a channel whose intermediates are held at a time


class _LowerBound(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, bound: float) -> Tensor:
        return x.clamp_min(bound)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(inputs[0] >= inputs[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (above,), (grad,) = ctx.saved_tensors, grads
        return torch.where(above | (grad < 0), grad, 0.0), None


def lower_bound(x: Tensor, bound: float) -> Tensor:
    """max(x, bound), whose gradient passes where x >= bound, and below it only where a step against it raises x.

    >>> x = torch.tensor([-1.0, -1.0], requires_grad=True)
    >>> torch.autograd.grad(lower_bound(x, 0.0), x, torch.tensor([1.0, -1.0]))[0].tolist()
    [0.0, -1.0]
    """
    return _LowerBound.apply(x, bound)


class GDN1(nn.Module):
    """y_i = x_i / n_i, or x_i n_i with `inverse`;  n_i = beta_i + sum_j gamma_ij |x_j|, per position of x [B, C, H, W].

    Stored are p with value max(p, bound)^2 - 2^-36, bound = sqrt(min + 2^-36), min = beta_min for beta and 0 for gamma.
    """

    PEDESTAL = 2.0**-36

    def __init__(
        self, channels: int, *, inverse: bool = False, beta_min: float = 1e-6, gamma_init: float = 0.1
    ) -> None:
        super().__init__()
        check_int("channels", channels, low=1)
        self.inverse = inverse
        self.beta_min = check_number("beta_min", beta_min, low=0.0)
        self.beta = nn.Parameter(torch.full((channels,), math.sqrt(1 + self.PEDESTAL)))
        self.gamma = nn.Parameter((gamma_init * torch.eye(channels) + self.PEDESTAL).sqrt())

    def _value(self, stored: Tensor, least: float) -> Tensor:
        return lower_bound(stored, math.sqrt(least + self.PEDESTAL)).square() - self.PEDESTAL

    def forward(self, x: Tensor) -> Tensor:
        check_float_tensor("x", x)
        if x.dim() != 4 or x.shape[1] != len(self.beta):
            raise ValueError(f"x: expected [B, {len(self.beta)}, H, W], got {tuple(x.shape)}")
        beta, gamma = self._value(self.beta, self.beta_min), self._value(self.gamma, 0.0)
        norm = F.conv2d(x.abs(), gamma[:, :, None, None], beta)
        return x * norm if self.inverse else x / norm


class EntropyBottleneck(ResizedBuffers):
    """A learned distribution for each channel of a latent: its likelihoods while training, tables and bytes afterwards.

    forward(y [B, C, ...]) -> (y_hat, likelihood), both of y's shape and float32 or wider. `update` makes the tables, buffers that
    are stored with the weights: two machines need not build the same one. After it nothing may change the prior.

    Args:
        channels: C. filters: f without its ends. init_scale: of the first distribution, and where q starts. tail_mass: of A.
        likelihood_bound: the least likelihood.
    Differs from CompressAI: where lo + up is exactly 0 its sign gives p = 0; each channel's upper tail is read at its own last sample.
    """

    offset: Tensor
    cdf_length: Tensor
    quantized_cdf: Tensor
    target: Tensor

    def __init__(
        self, channels: int, filters: Sequence[int] = (3, 3, 3, 3), *, init_scale: float = 10.0, tail_mass: float = 1e-9,
        likelihood_bound: float = 1e-9,
    ) -> None:  # fmt: skip
        super().__init__()
        self.channels, self.layers = check_int("channels", channels, low=1), len(filters) + 1
        check_number("init_scale", init_scale, low=0.0, open_low=True)
        check_number("tail_mass", tail_mass, low=0.0, high=1.0, open_low=True)
        self.likelihood_bound = check_number("likelihood_bound", likelihood_bound, low=0.0, open_low=True)
        scale = init_scale ** (1 / self.layers)
        for i, (before, after) in enumerate(pairwise((1, *filters, 1))):
            start = math.log(math.expm1(1 / (scale * after)))
            self.register_parameter(f"matrix{i}", nn.Parameter(torch.full((channels, after, before), start)))
            self.register_parameter(f"bias{i}", nn.Parameter(torch.rand(channels, after, 1) - 0.5))
            if i < len(filters):
                self.register_parameter(f"factor{i}", nn.Parameter(torch.zeros(channels, after, 1)))
        self.quantiles = nn.Parameter(torch.tensor([-init_scale, 0.0, init_scale]).repeat(channels, 1, 1))
        tail = math.log(2 / tail_mass - 1)
        self.register_buffer("target", torch.tensor([-tail, 0.0, tail]), persistent=False)
        for name, shape in (("offset", (0,)), ("cdf_length", (0,)), ("quantized_cdf", (0, 0))):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.int32))

    # ---------------------------------------------------------------- the distribution
    def logits(self, values: Tensor, *, fixed: bool = False) -> Tensor:
        """s(v) of values [C, 1, N]; fixed: M, b and a are constants."""

        def own(name: str) -> Tensor:
            parameter: Tensor = getattr(self, name)
            return (parameter.detach() if fixed else parameter).to(values.dtype)

        t = values
        for i in range(self.layers):
            t = F.softplus(own(f"matrix{i}")) @ t + own(f"bias{i}")
            if i < self.layers - 1:
                t = t + own(f"factor{i}").tanh() * t.tanh()
        return t

    def _mass(self, values: Tensor) -> Tensor:
        lo, up = self.logits(values - 0.5), self.logits(values + 0.5)
        # both at their small end: far to the right sigmoid(up) - sigmoid(lo) would be 1 - 1
        sign = torch.where(lo + up > 0, -1.0, 1.0)
        return (torch.sigmoid(sign * up) - torch.sigmoid(sign * lo)).abs()

    def likelihood(self, y_hat: Tensor) -> Tensor:
        """p(y_hat) of [B, C, ...], at least `likelihood_bound`."""
        rows = y_hat.movedim(1, 0)
        parts = rows.reshape(self.channels, 1, -1).split(CHUNK, -1)
        if len(parts) == 1:
            mass = self._mass(parts[0])
        else:  # a long latent is read again in backward: some twenty intermediates of three times its size are never held
            mass = torch.cat(
                [checkpoint(self._mass, p, use_reentrant=False, preserve_rng_state=False) for p in parts], -1
            )
        return lower_bound(mass.reshape(rows.shape).movedim(0, 1), self.likelihood_bound)

    def medians(self, like: Tensor) -> Tensor:
        """m, a constant, [C, 1, ...] for a latent [B, C, ...]."""
        return self.quantiles[:, 0, 1].detach().to(compute_dtype(like)).reshape(-1, *(1,) * (like.dim() - 2))

    def quantize(self, y: Tensor, *, use_medians: bool = True) -> Tensor:
        """round(y - m) + m, or round(y); without gradient."""
        y = self._latent(y).detach()
        return torch.round(y - self.medians(y)) + self.medians(y) if use_medians else torch.round(y)

    def forward(self, y: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(y_hat, likelihood). noise: in place of U(-1/2, 1/2), of y's shape."""
        y = self._latent(y)
        if self.training:
            y_hat = y + (torch.rand_like(y) - 0.5 if noise is None else noise)
        else:
            y_hat = self.quantize(y)
        return y_hat, self.likelihood(y_hat)

    def _latent(self, y: Tensor) -> Tensor:
        check_float_tensor("y", y)
        if y.dim() < 2 or y.shape[1] != self.channels:
            raise ValueError(f"y: expected [B, {self.channels}, ...], got {tuple(y.shape)}")
        return y.to(compute_dtype(y))

    # ---------------------------------------------------------------- quantiles and tables
    def aux_loss(self) -> Tensor:
        """A, whose gradient reaches q alone."""
        return (self.logits(self.quantiles, fixed=True) - self.target).abs().sum()

    @torch.no_grad()
    def solve_quantiles(self) -> None:
        """Sets q to where A is 0, by bisection: what learning q ends in, however short the training was."""
        target = self.target.double().expand(self.channels, 1, 3)
        low, high = -torch.ones_like(target), torch.ones_like(target)
        for _ in range(60):  # s grows at least linearly
            low = torch.where(self.logits(low) > target, 2 * low, low)
            high = torch.where(self.logits(high) < target, 2 * high, high)
        for _ in range(80):
            middle = (low + high) / 2
            below = self.logits(middle) < target
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        self.quantiles.copy_(high)

    @property
    def updated(self) -> bool:
        return self.quantized_cdf.numel() > 0

    @torch.no_grad()
    def update(self) -> None:
        """Makes the tables from prior and quantiles, in float32: samples m - minima .. m + maxima, then the escape symbol of both tails."""
        left, median, right = self.quantiles[:, 0].float().unbind(1)
        minima, maxima = (torch.ceil(d).clamp_min(0) for d in (median - left, right - median))
        longest = float((minima + maxima).max())
        if not longest + 2 <= entropy_coding.ONE:  # NaN too
            raise ValueError(f"quantiles: expected tails that leave a table of at most {entropy_coding.ONE} symbols, got {longest + 2:g}")  # fmt: skip
        minima, maxima = minima.int(), maxima.int()
        lengths = minima + maxima + 1
        samples = median[:, None] - minima[:, None] + torch.arange(int(lengths.max()), device=left.device)
        values = samples.unsqueeze(1)
        mass = self._mass(values)[:, 0]
        last = values.gather(2, (lengths - 1).long()[:, None, None])
        tails = torch.sigmoid(self.logits(values[:, :, :1] - 0.5)) + torch.sigmoid(-self.logits(last + 0.5))
        tables = [
            entropy_coding.quantize_pmf([*row[:length], tail])
            for row, length, tail in zip(mass.tolist(), lengths.tolist(), tails.flatten().tolist())
        ]
        padded = [table + [0] * (int(longest) + 3 - len(table)) for table in tables]
        device = self.quantiles.device
        self.offset, self.cdf_length = (-minima).to(device), (lengths + 2).to(torch.int32).to(device)
        self.quantized_cdf = torch.tensor(padded, dtype=torch.int32, device=device)

    # ---------------------------------------------------------------- bytes
    def _tables(self, positions: int) -> list[list[int]]:
        """The table of each element of one sample [C, ...] with so many positions in a channel."""
        if not self.updated:
            raise ValueError("update: the tables are not made yet; call update() once the prior is trained")
        tables = [row[:n] for row, n in zip(self.quantized_cdf.tolist(), self.cdf_length.tolist())]
        return [table for table in tables for _ in range(positions)]

    @torch.no_grad()
    def compress(self, y: Tensor) -> list[bytes]:
        """The streams of round(y - m), one for each sample; any finite y comes back, however far outside the tables."""
        y = self._latent(y)
        positions = math.prod(y.shape[2:])
        tables = self._tables(positions)
        if not bool(y.isfinite().all()):
            raise ValueError("y: expected finite values")
        rounded = torch.round(y - self.medians(y)).reshape(len(y), self.channels, positions).tolist()
        offsets = self.offset.tolist()
        return [
            entropy_coding.encode(
                [int(value) - offset for row, offset in zip(sample, offsets) for value in row], tables
            )
            for sample in rounded
        ]

    @torch.no_grad()
    def decompress(self, strings: Sequence[bytes], shape: Sequence[int]) -> Tensor:
        """y_hat [B, C, *shape] of the streams; the same bits as `quantize` gave. ValueError when the shape holds another number of positions."""
        tables = self._tables(math.prod(shape))
        offsets = [offset for offset in self.offset.tolist() for _ in range(math.prod(shape))]
        rows = [[float(symbol + o) for symbol, o in zip(entropy_coding.decode(s, tables), offsets)] for s in strings]
        rounded = torch.tensor(rows, dtype=torch.float64).to(self.quantiles.device, compute_dtype(self.quantiles))
        rounded = rounded.reshape(len(strings), self.channels, *shape)
        return rounded + self.medians(rounded)
