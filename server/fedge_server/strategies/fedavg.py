"""FedAvg's weighted mean (McMahan et al. 2017), tensor by tensor: as large as one model, whoever answered.

sum_k n_k / n * w_k, in the same order of additions as Flower's own, so the results are equal to the bit.
Flower's holds one more copy of the model, as `.npy` bytes, and reads all tensors of a reply before the next.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, Message, MetricRecord
from flwr.serverapp import strategy as flower

from fedge.wire.arrays import MemoryArray, pieces, records_of


class FedAvg(flower.FedAvg):
    """Flower's FedAvg with another `aggregate_train`."""

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The mean of the replies' arrays and metrics, weighted by their numbers of examples."""
        # The round loop has looked at each reply; Flower's check would do so again, at a greater cost.
        valid, _ = self._check_and_log_replies(replies, is_train=True, validate=False)
        if not valid:
            return None, None
        contents = [message.content for message in valid]
        records = [next(iter(records_of(content, ArrayRecord).values())) for content in contents]
        weights = [
            float(next(iter(records_of(content, MetricRecord).values()))[self.weighted_by_key])  # type: ignore[arg-type]
            for content in contents
        ]
        mean = weighted_mean(records, weights)
        return mean, self.train_metrics_aggr_fn(contents, self.weighted_by_key)


class FedProx(flower.FedProx, FedAvg):
    """Flower's FedProx over the mean above."""


class FedAvgM(flower.FedAvgM, FedAvg):
    """Flower's FedAvgM over the mean above."""


class FedAdagrad(flower.FedAdagrad, FedAvg):
    """Flower's FedAdagrad over the mean above."""


class FedAdam(flower.FedAdam, FedAvg):
    """Flower's FedAdam over the mean above."""


class FedYogi(flower.FedYogi, FedAvg):
    """Flower's FedYogi over the mean above."""


def weighted_mean(records: list[ArrayRecord], weights: list[float]) -> ArrayRecord:
    """The mean of records with the same names and shapes; of a reply it holds a piece of a tensor at a time.

    Args:
        records: one per reply; their arrays may lie in files.
        weights: one per record, with a sum above 0.
    """
    total = sum(weights)
    factors = [weight / total for weight in weights]
    mean = ArrayRecord()
    for name in records[0]:
        mean[name] = MemoryArray(_mean_of([record[name] for record in records], factors), shared=False)
    return mean


def _mean_of(arrays: list[Array], factors: list[float]) -> npt.NDArray[Any]:
    found = _scaled(arrays[0].numpy(), factors[0])
    if not found.flags.c_contiguous:  # a reply of this process; those from elsewhere are
        found = np.ascontiguousarray(found)
    flat = found.reshape(-1)
    for array, factor in zip(arrays[1:], factors[1:], strict=True):
        for start, piece in pieces(array):
            flat[start : start + piece.size] += piece * factor
    return found


def _scaled(value: npt.NDArray[Any], factor: float) -> npt.NDArray[Any]:
    """The product, in the array's own memory where that is ours to write to."""
    if value.flags.writeable and value.flags.owndata and value.dtype.kind == "f":
        value *= factor
        return value
    return np.asarray(value * factor)
