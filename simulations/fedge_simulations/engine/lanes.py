"""A round's clients in lanes: what is summed together, whoever does it.

Sums are not associative in floating point. So that the same clients give the same sum whatever is batched
together and however many processes do the work, each client belongs to one of LANES lanes by its place alone,
each lane is summed in float64 in one order, and the lanes are added up in their order.

Legend as in `stack`; L lanes of a part.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from fedge_simulations.trainers import Client

BLOCK = 2**15  # values that are weighted at a time
LANES = 16  # more processes than these have nothing to do; fewer would leave them waiting for the last


@dataclass(frozen=True, slots=True)
class Part:
    """Clients of neighbouring lanes, those with most steps first: what one process does in one go."""

    clients: tuple[Client, ...]
    lane_of: tuple[int, ...]  # of each, counted from 0 in this part
    lanes: int  # L
    longest: int = 0  # examples of the largest client of the whole round; 0: all have as many


def cut(ordered: Sequence[Client], *, at_once: int, processes: int) -> list[Part]:
    """A round's clients in parts: lanes are kept whole, and stacks full where there are enough clients.

    Args:
        ordered: those with most steps first.
        at_once: clients that are worth batching together.
        processes: that shall all have something to do.
    """
    lanes = min(LANES, len(ordered))
    wanted = -(-at_once * lanes // len(ordered))  # lanes that fill a stack
    each = max(1, min(wanted, lanes // min(processes, lanes)))
    sizes = [len(client.indices) for client in ordered]
    longest = max(sizes) if max(sizes) > min(sizes) else 0
    found = []
    for first in range(0, lanes, each):
        count = min(each, lanes - first)
        chosen = [i for i in range(len(ordered)) if first <= i % lanes < first + count]
        own = tuple(i % lanes - first for i in chosen)
        found.append(Part(tuple(ordered[i] for i in chosen), own, count, longest))
    return found


@dataclass(slots=True)
class Sums:
    """Running weighted sums of a part's lanes."""

    values: torch.Tensor  # (L, D) float64
    examples: npt.NDArray[np.int64]  # (L,)
    losses: npt.NDArray[np.float64]  # (L,) weighted by examples
    clients: npt.NDArray[np.int64]  # (L,) that are in the sum
    failed: dict[int, str] = field(default_factory=dict)  # by node id: why a client is not

    @classmethod
    def zero(cls, lanes: int, size: int) -> Sums:
        """Nothing yet."""
        return cls(
            torch.zeros(lanes, size, dtype=torch.float64),
            np.zeros(lanes, np.int64),
            np.zeros(lanes),
            np.zeros(lanes, np.int64),
        )

    def add(
        self, rows: torch.Tensor, clients: Sequence[Client], lane_of: Sequence[int], losses: Iterable[float]
    ) -> None:
        """Trained clients, one after the other; whoever's values are not finite is left out.

        Args:
            rows: (K, D) float32.
            clients: whose these are; their examples are their weights.
            lane_of: the lane of each.
            losses: of each.
        """
        norms = torch.linalg.vector_norm(rows, dim=1).tolist()
        for i, (client, lane, loss, norm) in enumerate(zip(clients, lane_of, losses, norms, strict=True)):
            if not np.isfinite(loss) or not np.isfinite(norm):
                self.failed[client.node_id] = "its training diverged: values that are not finite"
                rows[i] = 0.0
                continue
            n = len(client.indices)
            self.examples[lane] += n
            self.losses[lane] += loss * n
            self.clients[lane] += 1
        weights = torch.tensor([len(client.indices) for client in clients], dtype=torch.float64)
        for start, stop in _runs(lane_of):
            first = lane_of[start]
            self._add_weighted(
                rows[start:stop], weights[start:stop, None], slice(first, first + stop - start)
            )

    def _add_weighted(self, rows: torch.Tensor, weights: torch.Tensor, lanes: slice) -> None:
        """Some columns at a time, so that what is in between stays in the processor's cache."""
        columns = max(1, BLOCK // len(rows))
        for start in range(0, rows.shape[1], columns):
            here = slice(start, start + columns)
            # Two operations, so that no fused multiplication rounds otherwise in one shape than in another.
            self.values[lanes, here].add_(rows[:, here] * weights)

    def take(self, other: Sums) -> None:
        """Add another part's lanes to this one's only lane, in their order."""
        for lane in range(len(other.values)):
            self.values[0].add_(other.values[lane])
            self.losses[0] += other.losses[lane]
        self.examples[0] += other.examples.sum()
        self.clients[0] += other.clients.sum()
        self.failed |= other.failed


def _runs(lane_of: Sequence[int]) -> Iterable[tuple[int, int]]:
    """Where lanes follow one another: from and to."""
    start = 0
    for i in range(1, len(lane_of) + 1):
        if i == len(lane_of) or lane_of[i] != lane_of[i - 1] + 1:
            yield start, i
            start = i
