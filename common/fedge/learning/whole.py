"""A network together with its pre-processing: raw input in, logits out, as it is exported and delivered."""

from __future__ import annotations

import torch
from torch import nn


class WholeModel(nn.Module):
    """Pre-processing followed by the network. Only the network is trained and travels in rounds."""

    def __init__(self, preprocess: nn.Module, network: nn.Module) -> None:
        super().__init__()
        self.preprocess = preprocess
        self.network = network

    def forward(self, raw: torch.Tensor) -> torch.Tensor:
        """Raw input (B, *spec.shape) of spec.dtype to logits (B, classes)."""
        logits: torch.Tensor = self.network(self.preprocess(raw))
        return logits
