"""Mixing within a batch: pairs added up with random shares (mixup, all or only some), or the statistics of their channels."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from kdfast._checks import check_choice, check_float_tensor, check_int, check_labels, check_number
from kdfast._library import compute_dtype, readable

SAMPLINGS = ("exact", "with_replacement")


class MixDraw(NamedTuple):
    """lam [B] shares in [0, 1], first [B] and second [B] permutations of the batch, unmixed [U] positions whose share becomes 1."""

    lam: Tensor
    first: Tensor
    second: Tensor
    unmixed: Tensor


class Mixed(NamedTuple):
    """inputs [B, ...]; the label of a row is labels_a with share lam and labels_b with 1 - lam."""

    inputs: Tensor
    labels_a: Tensor
    labels_b: Tensor
    lam: Tensor


def draw_mixup(
    batch_size: int,
    *,
    beta: float = 1.0,
    unmixed_fraction: float = 0.0,
    sampling: str = "exact",
    generator: torch.Generator | None = None,
) -> MixDraw:
    """lam_i ~ Beta(beta, beta) for each row, two permutations, and floor(B r) positions that stay unmixed (partial mixup).

    Args:
        unmixed_fraction: r in [0, 1]; 0 is full mixup. sampling: of the unmixed positions. "exact": a random subset of floor(B r);
            "with_replacement": as many draws with repeats, so that fewer are unmixed (41 % stay mixed for r = 0.9, B = 64).

    >>> draw = draw_mixup(64, unmixed_fraction=0.9)
    """
    check_int("batch_size", batch_size, low=1)
    check_number("beta", beta, low=0.0, open_low=True)
    check_number("unmixed_fraction", unmixed_fraction, low=0.0, high=1.0)
    check_choice("sampling", sampling, SAMPLINGS)
    number = int(batch_size * unmixed_fraction)
    first, second = (torch.randperm(batch_size, generator=generator) for _ in range(2))
    if sampling == "exact":
        unmixed = torch.randperm(batch_size, generator=generator)[:number]
    else:
        unmixed = torch.randint(batch_size, (number,), generator=generator)
    if generator is None:
        lam = torch.distributions.Beta(beta, beta).sample((batch_size,))
    else:  # torch's Beta takes no generator: a seed drawn from it
        seed = int(torch.randint(2**62, (), generator=generator))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            lam = torch.distributions.Beta(beta, beta).sample((batch_size,))
    return MixDraw(lam, first, second, unmixed)


def check_shares(name: str, lam: Tensor, rows: int) -> None:
    """ValueError unless [rows] numbers in [0, 1]."""
    if lam.shape != (rows,):
        raise ValueError(f"{name}: expected shape ({rows},), one entry per row, got {tuple(lam.shape)}")
    if readable(lam) and lam.numel() and not bool(((lam >= 0) & (lam <= 1)).all()):
        raise ValueError(f"{name}: expected shares in [0, 1], got {lam.min().item():g} to {lam.max().item():g}")


def check_permutation(name: str, index: Tensor, rows: int) -> None:
    """ValueError unless a permutation of [0, rows)."""
    if index.shape != (rows,):
        raise ValueError(f"{name}: expected shape ({rows},), one entry per row, got {tuple(index.shape)}")
    if readable(index) and not torch.equal(index.sort().values, torch.arange(rows)):
        raise ValueError(f"{name}: expected a permutation of {rows} rows, got {index.tolist()}")


def mix(inputs: Tensor, labels: Tensor, draw: MixDraw) -> Mixed:
    """x~_i = lam_i x[first_i] + (1 - lam_i) x[second_i], with lam = 1 at the unmixed positions; labels alike.

    Args: inputs: [B, ...] float. labels: [B] integers.
    Raises:
        ValueError: a share outside [0, 1], indices that are no permutation of the batch, positions outside it.

    >>> mixed = mix(images, labels, draw_mixup(len(images)))
    """
    check_float_tensor("inputs", inputs)
    rows = inputs.shape[:1]
    check_labels(labels, rows, labels.device)
    lam, first, second, unmixed = (tensor.to(inputs.device) for tensor in draw)
    check_shares("lam", lam, len(inputs))
    check_permutation("first", first, len(inputs))
    check_permutation("second", second, len(inputs))
    if readable(unmixed) and unmixed.numel() and not 0 <= int(unmixed.min()) <= int(unmixed.max()) < len(inputs):
        raise ValueError(f"unmixed: expected positions in [0, {len(inputs)}), got {unmixed.tolist()}")
    lam = lam.to(compute_dtype(inputs)).scatter(0, unmixed, 1.0)
    share = lam.view(-1, *[1] * (inputs.dim() - 1)).to(inputs.dtype)
    mixed = share * inputs[first] + (1 - share) * inputs[second]
    first, second = first.to(labels.device), second.to(labels.device)
    return Mixed(mixed, labels[first], labels[second], lam)


def soft_labels(labels_a: Tensor, labels_b: Tensor, lam: Tensor, num_classes: int) -> Tensor:
    """lam onehot(labels_a) + (1 - lam) onehot(labels_b): [B, C]; two equal labels add up to 1.

    >>> soft_labels(torch.tensor([0]), torch.tensor([2]), torch.tensor([0.75]), 3)
    tensor([[0.7500, 0.0000, 0.2500]])
    """
    share = lam.unsqueeze(1)
    return share * F.one_hot(labels_a.long(), num_classes) + (1 - share) * F.one_hot(labels_b.long(), num_classes)


class MixedRows(Dataset):
    """Batches (mixed inputs, soft labels [B, C]) of tensors of one length, mixed anew each time: to train with labels alone.

    Args: inputs: [N, ...]. labels: [N]. Others: `draw_mixup`.
    """

    def __init__(
        self, inputs: Tensor, labels: Tensor, num_classes: int, *, beta: float = 1.0, unmixed_fraction: float = 0.0
    ) -> None:
        self.inputs, self.labels, self.num_classes = inputs, labels, num_classes
        self.beta, self.unmixed_fraction = beta, unmixed_fraction

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        draw = draw_mixup(len(indices), beta=self.beta, unmixed_fraction=self.unmixed_fraction)
        mixed = mix(self.inputs[indices], self.labels[indices], draw)
        return mixed.inputs, soft_labels(mixed.labels_a, mixed.labels_b, mixed.lam, self.num_classes)


# ---------------------------------------------------------------- channel statistics
def mix_distribution(images: Tensor, lam: Tensor, perm: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Each image with the channel means and deviations of itself and another one, mixed; statistics carry no gradient.

        x' = (x - mu) / sig (lam sig + (1 - lam) sig[perm]) + lam mu + (1 - lam) mu[perm],   sig = sqrt(unbiased variance + eps)

    Args: images: [B, C, H, W] with more than one pixel. lam: [B] shares in [0, 1]. perm: [B], a permutation.
    """
    check_float_tensor("images", images)
    if images.dim() != 4 or images.shape[2] * images.shape[3] < 2:
        raise ValueError(f"images: expected [B, C, H, W] with more than one pixel, got shape {tuple(images.shape)}")
    check_shares("lam", lam, len(images))
    check_permutation("perm", perm, len(images))
    x = images.to(compute_dtype(images))
    mean = x.detach().mean((2, 3), keepdim=True)
    sigma = (x.detach().var((2, 3), keepdim=True) + eps).sqrt()
    share = lam.to(x).view(-1, 1, 1, 1)
    perm = perm.to(x.device)
    mixed = (x - mean) / sigma * (share * sigma + (1 - share) * sigma[perm])
    return (mixed + share * mean + (1 - share) * mean[perm]).to(images.dtype)


def draw_mix_distribution(batch_size: int, *, alpha: float = 0.1) -> tuple[Tensor, Tensor]:
    """lam_i ~ Beta(alpha, alpha) for each image, and a permutation."""
    check_number("alpha", alpha, low=0.0, open_low=True)
    return torch.distributions.Beta(alpha, alpha).sample((batch_size,)), torch.randperm(batch_size)
