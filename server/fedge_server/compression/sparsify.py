"""Single weights become 0: those of the smallest magnitude in the whole network (Han et al. 2015).

Han, Pool, Tran, Dally, "Learning both Weights and Connections for Efficient Neural Networks", NIPS 2015: one
threshold for all layers, so that each layer keeps as much as its weights are worth. Shapes stay as they are:
what is packed gets smaller, since xz spends almost nothing on zeros, but neither memory nor time do.

It asks nothing of an architecture, so recurrent layers and embeddings are pruned like others. Biases,
normalisation and everything else of one dimension stay.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from fedge.config import Prune
from fedge.errors import CompressionError
from fedge_server.compression.prune import Pruned, removed


def sparsify(network: nn.Module, sparsity: float, settings: Prune, *, seed: int) -> Pruned:
    """Set the share `sparsity` of all weights to exactly 0, the smallest first; the network is not changed.

    What is 0 already counts as removed, so a network can be pruned further in steps. Recovery:
    `distil(..., keep_zeros=True)` from the unpruned network, or `recovery` for both at once.

    Args:
        network: any.
        sparsity: of the weights with two dimensions or more; below 1.
        settings: criterion "random" draws the weights; of a single weight all others are the magnitude.
        seed: decides criterion "random".

    Raises:
        CompressionError: there are no weights, none would go, or some layer would lose all of its own.
    """
    pruned = copy.deepcopy(network).eval()
    named = [(name, p) for name, p in pruned.named_parameters() if p.dim() > 1]
    if not named:
        raise CompressionError("prune: the network has no weights of two or more dimensions")
    flat = torch.cat([p.detach().reshape(-1) for _, p in named])
    count = round(sparsity * len(flat))
    if count == 0:
        raise CompressionError(
            f"prune: no weight goes at sparsity {sparsity:g}; the network has {len(flat)} of them"
        )
    kept = torch.ones(len(flat), dtype=torch.bool)
    kept[torch.argsort(_importance(flat, settings, seed), stable=True)[:count]] = False
    before = _squares(pruned)
    with torch.no_grad():
        for (name, parameter), mask in zip(
            named, torch.split(kept, [p.numel() for _, p in named]), strict=True
        ):
            if not mask.any():
                raise CompressionError(
                    f"prune: at sparsity {sparsity:g} nothing is left of {name!r}; prune less"
                )
            parameter[~mask.reshape(parameter.shape)] = 0.0
    total = sum(p.numel() for p in pruned.parameters())
    return Pruned(pruned, total - count, total, removed(before, _squares(pruned)))


def _importance(weights: torch.Tensor, settings: Prune, seed: int) -> torch.Tensor:
    if settings.criterion != "random":
        return weights.abs()
    drawn = torch.rand(len(weights), generator=torch.Generator().manual_seed(seed))
    return torch.where(weights == 0, -1.0, drawn)  # what is gone stays gone


def _squares(network: nn.Module) -> float:
    return sum(float(p.detach().double().square().sum()) for p in network.parameters())
