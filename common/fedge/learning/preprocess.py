"""From raw input to what a network takes; these modules are exported into every variant.

So a device needs no code of its own for it, and cannot pre-process otherwise than training did.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from fedge.config import FilterName
from fedge.errors import ConfigError
from fedge.spec import Kind, Spec
from fedge.statistics import Moments

CLIP_DEVIATIONS = 5.0


class ImageInput(nn.Module):
    """Raw images (B, H, W) or (B, H, W, C) to standardised float32 (B, C, H, W)."""

    mean: torch.Tensor
    std: torch.Tensor
    kernel: torch.Tensor

    def __init__(self, spec: Spec, mean: torch.Tensor, std: torch.Tensor, noise_filter: FilterName) -> None:
        super().__init__()
        self.has_channels = len(spec.shape) == 3
        self.noise_filter = noise_filter
        self.register_buffer("mean", mean.reshape(1, -1, 1, 1))  # (1, C, 1, 1)
        self.register_buffer("std", std.reshape(1, -1, 1, 1))
        row = torch.tensor([0.25, 0.5, 0.25])  # binomial 3x3, the usual discrete Gaussian
        self.register_buffer("kernel", torch.outer(row, row).repeat(spec.channels, 1, 1, 1))  # (C, 1, 3, 3)

    def forward(self, raw: torch.Tensor) -> torch.Tensor:
        """Raw (B, H, W[, C]) to (B, C, H, W)."""
        x = raw.to(torch.float32)
        x = x.permute(0, 3, 1, 2) if self.has_channels else x.unsqueeze(1)  # (B, C, H, W)
        if self.noise_filter == "median":
            x = _median3(x)
        elif self.noise_filter == "gaussian":
            x = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), self.kernel, groups=x.shape[1])
        return (x - self.mean) / self.std


def _median3(x: torch.Tensor) -> torch.Tensor:
    """Median of each 3x3 window, edges repeated: removes single wrong pixels and keeps edges."""
    h, w = x.shape[-2:]
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    shifted = [padded[..., i : i + h, j : j + w] for i in range(3) for j in range(3)]
    return torch.stack(shifted, dim=-1).topk(5, dim=-1).values[..., 4]  # the fifth largest of nine


class FeatureInput(nn.Module):
    """Raw table rows (B, F) with NaN for missing values to standardised float32 (B, F).

    A missing value becomes the column's federated mean (0 once standardised); the network sees no more.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, mean: torch.Tensor, std: torch.Tensor, clip: float | None) -> None:
        super().__init__()
        self.clip = clip
        self.register_buffer("mean", mean.reshape(1, -1))  # (1, F)
        self.register_buffer("std", std.reshape(1, -1))

    def forward(self, raw: torch.Tensor) -> torch.Tensor:
        """Raw (B, F) to (B, F)."""
        x = raw.to(torch.float32)
        x = torch.where(torch.isnan(x), self.mean, x)
        x = (x - self.mean) / self.std
        return x if self.clip is None else x.clamp(-self.clip, self.clip)


class SignalInput(nn.Module):
    """Raw windows (B, T, C) with NaN for missing values to standardised float32 (B, C, T).

    A missing value becomes its channel's federated mean, 0 once standardised: a device may lack a sensor.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, mean: torch.Tensor, std: torch.Tensor, clip: float | None) -> None:
        super().__init__()
        self.clip = clip
        self.register_buffer("mean", mean.reshape(1, 1, -1))  # (1, 1, C)
        self.register_buffer("std", std.reshape(1, 1, -1))

    def forward(self, raw: torch.Tensor) -> torch.Tensor:
        """Raw (B, T, C) to (B, C, T)."""
        x = raw.to(torch.float32)
        x = torch.where(torch.isnan(x), self.mean, x)
        x = (x - self.mean) / self.std
        x = x if self.clip is None else x.clamp(-self.clip, self.clip)
        return x.transpose(1, 2)


class TextInput(nn.Module):
    """Raw codes (B, T) of one byte to the int64 (B, T) that an embedding takes."""

    def forward(self, raw: torch.Tensor) -> torch.Tensor:
        """Raw (B, T) to (B, T)."""
        return raw.to(torch.int64)


_FILTERS: dict[Kind, tuple[FilterName, ...]] = {
    "image": ("none", "median", "gaussian"),
    "features": ("none", "clip"),
    "signal": ("none", "clip"),
    "text": ("none",),
}


def build(spec: Spec, moments: Moments | None, noise_filter: FilterName) -> nn.Module:
    """The standard pre-processing: noise filter, missing values, standardisation.

    Args:
        spec: the raw input.
        moments: the federated moments of the raw inputs; None leaves values as they are, but uint8
            images are still brought to 0..1 (and missing values to 0). Text takes none.
        noise_filter: 'median' or 'gaussian' for images, 'clip' (at 5 deviations) for tables and signals.

    Raises:
        ConfigError: the filter is for the other kind of input.
    """
    wanted = _FILTERS[spec.kind]
    if noise_filter not in wanted:
        raise ConfigError(
            f"model.filter = {noise_filter!r}: {spec.kind} inputs take one of {', '.join(wanted)}"
        )
    if spec.kind == "text":
        return TextInput()
    if moments is None:
        mean, std = np.zeros(spec.channels), np.full(spec.channels, 255.0 if spec.dtype == "uint8" else 1.0)
    else:
        mean, std = moments.mean, moments.std
    mean32, std32 = (torch.from_numpy(v.astype(np.float32)) for v in (mean, std))
    if spec.kind == "image":
        return ImageInput(spec, mean32, std32, noise_filter)
    clip = CLIP_DEVIATIONS if noise_filter == "clip" else None
    return (SignalInput if spec.kind == "signal" else FeatureInput)(mean32, std32, clip)
