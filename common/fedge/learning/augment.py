"""Augmentation of pre-processed training batches; each example draws from a key of its own."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from fedge.learning import draws


def augment(x: torch.Tensor, names: tuple[str, ...], keys: torch.Tensor) -> torch.Tensor:
    """A batch changed at random, one draw per example; the input is left as it is.

    Args:
        x: (B, C, H, W) images or (B, F) features, pre-processed (about unit variance).
        names: applied in order: 'flip' (left-right, half of the images), 'shift:PIXELS' (up to so many,
            edges repeated), 'noise:STD' (Gaussian, in pre-processed units), 'mask:SHARE' (so large a
            share of the values set to 0, which is the mean after standardisation).
        keys: (B,) int64, one for each example: they decide all that is drawn (`fedge.learning.draws`).

    Returns:
        A tensor of x's shape.

    Raises:
        ValueError: an image augmentation is asked of features.
    """
    if names and not x.is_floating_point():
        raise ValueError(f"augmentation {names[0]!r} is for numbers; text takes none")
    for i, name in enumerate(names):
        kind, _, value = name.partition(":")
        own = draws.derive(keys, i)
        if kind in ("flip", "shift") and x.dim() != 4:
            raise ValueError(f"augmentation {name!r} is for images; these inputs have shape {tuple(x.shape)}")
        if kind == "flip":
            chosen = draws.uniform(own, 1) < 0.5  # (B, 1)
            x = torch.where(chosen[:, :, None, None], x.flip(-1), x)
        elif kind == "shift":
            x = _shift(x, draws.integers(own, 2, 2 * int(value) + 1), int(value))
        elif kind == "noise":
            x = x + draws.normal(own, x[0].numel()).reshape(x.shape).to(x.dtype) * float(value)
        elif kind == "mask":
            x = x * (draws.uniform(own, x[0].numel()).reshape(x.shape) >= float(value))
        else:
            raise ValueError(f"augmentation {name!r} is unknown")
    return x


def _shift(x: torch.Tensor, offsets: torch.Tensor, pixels: int) -> torch.Tensor:
    """Move each image by its own `offsets`, (B, 2) from 0 to 2 * pixels, of which `pixels` is no move."""
    b, _, h, w = x.shape
    padded = F.pad(x, (pixels,) * 4, mode="replicate")  # (B, C, H + 2p, W + 2p)
    rows = offsets[:, :1] + torch.arange(h, device=x.device)  # (B, H)
    columns = offsets[:, 1:] + torch.arange(w, device=x.device)  # (B, W)
    index = torch.arange(b, device=x.device)
    moved = padded[index[:, None, None], :, rows[:, :, None], columns[:, None, :]]  # (B, H, W, C)
    return moved.permute(0, 3, 1, 2).contiguous()
