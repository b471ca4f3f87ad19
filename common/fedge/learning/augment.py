"""Augmentation of pre-processed training batches, drawn from a generator so that a seed decides it."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def augment(x: torch.Tensor, names: tuple[str, ...], generator: torch.Generator) -> torch.Tensor:
    """A batch changed at random, one draw per example; the input is left as it is.

    Args:
        x: (B, C, H, W) images or (B, F) features, pre-processed (about unit variance).
        names: applied in order: 'flip' (left-right, half of the images), 'shift:PIXELS' (up to so many,
            edges repeated), 'noise:STD' (Gaussian, in pre-processed units), 'mask:SHARE' (so large a
            share of the values set to 0, which is the mean after standardisation).
        generator: source of all randomness.

    Returns:
        A tensor of x's shape.

    Raises:
        ValueError: an image augmentation is asked of features.
    """
    for name in names:
        kind, _, value = name.partition(":")
        if kind in ("flip", "shift") and x.dim() != 4:
            raise ValueError(f"augmentation {name!r} is for images; these inputs have shape {tuple(x.shape)}")
        if kind == "flip":
            chosen = torch.rand(len(x), generator=generator) < 0.5
            x = torch.where(chosen[:, None, None, None], x.flip(-1), x)
        elif kind == "shift":
            x = _shift(x, int(value), generator)
        elif kind == "noise":
            x = x + torch.randn(x.shape, generator=generator, dtype=x.dtype) * float(value)
        elif kind == "mask":
            x = x * (torch.rand(x.shape, generator=generator) >= float(value))
        else:
            raise ValueError(f"augmentation {name!r} is unknown")
    return x


def _shift(x: torch.Tensor, pixels: int, generator: torch.Generator) -> torch.Tensor:
    """Move each image by its own whole number of pixels in both directions."""
    b, _, h, w = x.shape
    padded = F.pad(x, (pixels,) * 4, mode="replicate")  # (B, C, H + 2p, W + 2p)
    offsets = torch.randint(0, 2 * pixels + 1, (2, b, 1), generator=generator)
    rows = offsets[0] + torch.arange(h)  # (B, H)
    columns = offsets[1] + torch.arange(w)  # (B, W)
    index = torch.arange(b)
    moved = padded[index[:, None, None], :, rows[:, :, None], columns[:, None, :]]  # (B, H, W, C)
    return moved.permute(0, 3, 1, 2).contiguous()
