"""Quarter turns of images, exact pixel permutations: the labels of a task that needs none."""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast._checks import check_choice, check_int

LAYOUTS = ("image_major", "rotation_major")


def rotate90(x: Tensor, k: int) -> Tensor:
    """k quarter turns counter-clockwise of images [..., H, W]: R_1(x)[i, j] = x[j, W-1-i]; k in 0 to 3.

    Odd turns swap H and W.

    >>> rotate90(torch.tensor([[[1, 2], [3, 4]]]), 1).tolist()
    [[[2, 4], [1, 3]]]
    """
    if check_int("k", k) > 3:
        raise ValueError(f"k: expected 0 to 3 quarter turns, got {k}")
    if x.dim() not in (3, 4):
        raise ValueError(f"x: expected images [B, C, H, W] or [C, H, W], got shape {tuple(x.shape)}")
    return torch.rot90(x, k, (-2, -1))


def rotation_labels(images: int, *, layout: str = "image_major", device: torch.device | None = None) -> Tensor:
    """[4 B]: 0, 1, 2, 3 for each image in turn ("image_major"), or all 0 first, then all 1, ... ("rotation_major")."""
    check_choice("layout", layout, LAYOUTS)
    turns = torch.arange(4, device=device)
    return turns.repeat(images) if layout == "image_major" else turns.repeat_interleave(images)


def rotate4(
    x: Tensor, *, mean: Tensor | float | None = None, std: Tensor | float | None = None, dtype: torch.dtype | None = None,
    layout: str = "image_major",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """All four quarter turns of each image, and which turn it is: ([4 B, C, H, W], [4 B]).

    Args:
        x: [B, C, S, S]. Augment before (one draw for the four copies); normalisation may come before or after, it commutes.
        dtype: of the result, None keeps x's. uint8 becomes [0, 1] in a float dtype.
        mean, std: one number, or one per channel, taken off and divided by; the result must then be float.
        layout: "image_major", rows 4b to 4b+3 are the turns of image b; or "rotation_major".
    Raises:
        ValueError: images that are not square, whose turns do not fit one tensor (`rotate_pairs` takes them); an empty batch.

    >>> images, turns = rotate4(torch.rand(8, 3, 32, 32))
    """
    check_choice("layout", layout, LAYOUTS)
    if x.dim() != 4 or not x.numel():
        raise ValueError(f"x: expected images [B, C, H, W], at least one, got shape {tuple(x.shape)}")
    if x.shape[2] != x.shape[3]:
        raise ValueError(
            f"x: expected square images, got {x.shape[2]} x {x.shape[3]}; rotate_pairs takes them in two batches"
        )
    x = _normalised(x, mean, std, dtype)
    turned = torch.stack([rotate90(x, k) for k in range(4)], 1 if layout == "image_major" else 0)
    return turned.flatten(0, 1), rotation_labels(len(x), layout=layout, device=x.device)


def rotate_pairs(x: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images of any shape [B, C, H, W] in two batches: the turns 0 and 2 [2 B, C, H, W], and 1 and 3 [2 B, C, W, H]; with labels.

    Image-major, the labels are turns.
    """
    if x.dim() != 4 or not x.numel():
        raise ValueError(f"x: expected images [B, C, H, W], at least one, got shape {tuple(x.shape)}")

    def pair(first: int) -> tuple[Tensor, Tensor]:
        turned = torch.stack([rotate90(x, first), rotate90(x, first + 2)], 1).flatten(0, 1)
        return turned, torch.tensor([first, first + 2], device=x.device).repeat(len(x))

    return pair(0), pair(1)


def _normalised(
    x: Tensor, mean: Tensor | float | None, std: Tensor | float | None, dtype: torch.dtype | None
) -> Tensor:
    dtype = dtype or x.dtype
    if not dtype.is_floating_point and (mean is not None or std is not None):
        raise TypeError(f"dtype: expected a float dtype to normalise in, got {dtype}")
    scaled = x.to(dtype) / 255 if x.dtype == torch.uint8 and dtype.is_floating_point else x.to(dtype)

    def per_channel(value: Tensor | float) -> Tensor:
        return torch.as_tensor(value, dtype=dtype, device=x.device).reshape(-1, 1, 1)

    scaled = scaled if mean is None else scaled - per_channel(mean)
    return scaled if std is None else scaled / per_channel(std)
