"""Whole channels are removed along the dependency graph (Fang, Ma, Song, Mi, Wang 2023).

"DepGraph: Towards Any Structural Pruning", CVPR 2023, by the authors' library torch-pruning: layers whose
channels depend on one another lose the same ones, those of the smallest norm over the whole group. What is
left is a smaller dense network, so it gains in bytes, memory and speed alike.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from fedge.config import Prune
from fedge.errors import CompressionError

_PRUNABLE = (nn.Linear, nn.modules.conv._ConvNd)
_NORM = {"l1": 1.0, "l2": 2.0}


@dataclass(frozen=True, slots=True)
class Pruned:
    """A pruned network and how much went."""

    network: nn.Module  # in evaluation mode
    parameters: int  # of it
    parameters_before: int
    energy_removed: float  # share of the sum of squared weights that was removed, 0 .. 1


def prune(network: nn.Module, example: Tensor, ratio: float, settings: Prune, *, seed: int) -> Pruned:
    """Remove about `ratio` of the channels of every layer except the one that gives the answer.

    The network is not changed; the copy keeps the weights of the channels it keeps, and usually needs
    recovery: `distil` from the unpruned network.

    Args:
        network: pre-processed inputs to logits (B, C).
        example: pre-processed inputs (B, ...) of two examples or more, to trace the dependencies.
        ratio: share of channels, above 0 and below 1; a linear layer between two pruned ones thus keeps
            (1 - ratio)^2 of its weights.
        settings: the criterion.
        seed: decides criterion "random".

    Raises:
        CompressionError: it has recurrent layers, whose gates share channels in ways that the dependency
            graph does not know; nothing could be removed; or the pruned network no longer gives (B, C).
    """
    if any(isinstance(module, nn.RNNBase) for module in network.modules()):
        raise CompressionError("prune: recurrent layers cannot be pruned; a student is the smaller network")
    pruned = copy.deepcopy(network).eval()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            wanted = _answer_shape(pruned, example)
            pruner = tp.pruner.BasePruner(
                pruned, example, _importance(settings), pruning_ratio=ratio,
                ignored_layers=[_last_layer(pruned, example)],
            )  # fmt: skip
            pruner.step()
            given = _answer_shape(pruned, example)
    except CompressionError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise CompressionError(f"prune: the network cannot be pruned at {ratio:g} ({reason})") from error
    if given != wanted:
        raise CompressionError(f"prune: the pruned network answers {given}, not {wanted}")
    before, after = _size(network), _size(pruned)
    if after[0] >= before[0]:
        raise CompressionError(
            f"prune: no channel can be removed at ratio {ratio:g}; the network is too small"
        )
    return Pruned(pruned, after[0], before[0], 1 - after[1] / before[1] if before[1] else 0.0)


def _importance(settings: Prune) -> Any:
    if settings.criterion == "random":
        return tp.importance.RandomImportance()
    return tp.importance.GroupMagnitudeImportance(p=_NORM.get(settings.criterion, settings.p))


def _last_layer(network: nn.Module, example: Tensor) -> nn.Module:
    """The layer that runs last: its outputs are the classes.

    Raises:
        CompressionError: the network has no linear or convolutional layer.
    """
    order: list[nn.Module] = []
    handles = [
        module.register_forward_hook(lambda layer, _inputs, _output: order.append(layer))
        for module in network.modules()
        if isinstance(module, _PRUNABLE)
    ]
    try:
        _answer_shape(network, example)
    finally:
        for handle in handles:
            handle.remove()
    if not order:
        raise CompressionError("prune: the network has no linear or convolutional layer")
    return order[-1]


@torch.no_grad()
def _answer_shape(network: nn.Module, example: Tensor) -> tuple[int, ...]:
    return tuple(network(example).shape)


def _size(network: nn.Module) -> tuple[int, float]:
    """Number of parameters, and the sum of their squares."""
    parameters = list(network.parameters())
    squares = sum(float(parameter.detach().double().square().sum()) for parameter in parameters)
    return sum(parameter.numel() for parameter in parameters), squares
