"""Whole channels are removed along the dependency graph (Fang, Ma, Song, Mi, Wang 2023).

"DepGraph: Towards Any Structural Pruning", CVPR 2023, by the authors' library torch-pruning: layers whose
channels depend on one another lose the same ones, those of the smallest norm over the whole group. What is
left is a smaller dense network, so it gains in bytes, memory and speed alike. Single weights: `sparsify`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from fedge.config import Prune
from fedge.errors import CompressionError
from fedge_server.compression.layers import last_layer

_NORM = {"l1": 1.0, "l2": 2.0}


@dataclass(frozen=True, slots=True)
class Pruned:
    """A pruned network and how much went."""

    network: nn.Module  # in evaluation mode
    parameters: int  # of it; those that pruning has set to 0 are not counted
    parameters_before: int
    energy_removed: (
        float  # share of the sum of squared weights that went, of several steps in the last; 0 .. 1
    )


def prune(network: nn.Module, example: Tensor, ratio: float, settings: Prune, *, seed: int) -> Pruned:
    """Remove about `ratio` of the channels of every layer except the one that gives the answer.

    The network is not changed; the copy keeps the weights of the channels it keeps, and usually needs
    recovery: `distil` from the unpruned network, or `recovery` for both at once.

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
    channels = Channels(network, example, (ratio,), settings)
    channels.remove(seed)
    return channels.pruned()


class Channels:
    """A copy of a network that loses channels in steps; between them it may learn."""

    def __init__(self, network: nn.Module, example: Tensor, ratios: Sequence[float], settings: Prune) -> None:
        """Trace the dependencies.

        Args:
            network: is not changed.
            example: pre-processed inputs (B, ...), two or more.
            ratios: share of the first channels that is gone after each step.
            settings: the criterion.

        Raises:
            CompressionError: as `prune`.
        """
        if any(isinstance(module, nn.RNNBase) for module in network.modules()):
            raise CompressionError(
                "prune: recurrent layers cannot be pruned by channels; their single weights can become 0 "
                "(compress.prune.kinds = ['unstructured']), and a student is the smaller network"
            )
        self.network = copy.deepcopy(network).eval()
        self._example, self._ratio, self._before = example, ratios[-1], _size(network)
        self._wanted = _answer_shape(self.network, example)
        parts = (0.0, *(ratio / ratios[-1] for ratio in ratios))
        try:
            self._pruner = tp.pruner.BasePruner(
                self.network, example, _importance(settings), pruning_ratio=ratios[-1],
                iterative_steps=len(ratios), ignored_layers=[last_layer(self.network, example)],
                iterative_pruning_ratio_scheduler=lambda ratio, _: [ratio * part for part in parts],
            )  # fmt: skip
        except CompressionError as error:
            raise CompressionError(f"prune: {error}") from error
        except Exception as error:
            raise self._unfit(error) from error

    def remove(self, seed: int) -> None:
        """Take the next step.

        Raises:
            CompressionError: the network cannot be pruned, or no longer gives (B, C).
        """
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self._pruner.step()
            given = _answer_shape(self.network, self._example)
        except Exception as error:
            raise self._unfit(error) from error
        if given != self._wanted:
            raise CompressionError(f"prune: the pruned network answers {given}, not {self._wanted}")

    def learned(self, network: nn.Module) -> None:
        """Take over the weights of a trained copy of the network as it now is."""
        self.network.load_state_dict(network.state_dict())
        self._before = self._before[0], _size(network)[1]

    def pruned(self) -> Pruned:
        """The network, and what went; the sum of squares since it last learned.

        Raises:
            CompressionError: nothing did.
        """
        after = _size(self.network)
        if after[0] >= self._before[0]:
            raise CompressionError(
                f"prune: no channel can be removed at ratio {self._ratio:g}; the network is too small"
            )
        return Pruned(self.network, after[0], self._before[0], removed(self._before[1], after[1]))

    def _unfit(self, error: Exception) -> CompressionError:
        reason = " ".join(str(error).split())[:200]
        return CompressionError(f"prune: the network cannot be pruned at {self._ratio:g} ({reason})")


def removed(before: float, after: float) -> float:
    """Share of the sum of squares that is gone."""
    return max(1 - after / before, 0.0) if before else 0.0


def _importance(settings: Prune) -> Any:
    if settings.criterion == "random":
        return tp.importance.RandomImportance()
    return tp.importance.GroupMagnitudeImportance(p=_NORM.get(settings.criterion, settings.p))


@torch.no_grad()
def _answer_shape(network: nn.Module, example: Tensor) -> tuple[int, ...]:
    return tuple(network(example).shape)


def _size(network: nn.Module) -> tuple[int, float]:
    """Number of parameters, and the sum of their squares."""
    parameters = list(network.parameters())
    squares = sum(float(parameter.detach().double().square().sum()) for parameter in parameters)
    return sum(parameter.numel() for parameter in parameters), squares
