"""FedAvg's weighted mean (McMahan et al. 2017), tensor by tensor: as large as one model, whoever answered.

sum_k n_k / n * w_k, in the same order of additions as Flower's own, so the results are equal to the bit.
Flower's holds one more copy of the model, as `.npy` bytes, and reads all tensors of a reply before the next.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower

from fedge.wire.arrays import FileArray, MemoryArray, pieces, records_of


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


def weighted_metrics(contents: list[RecordDict], key: str) -> MetricRecord:
    """The mean of the metrics in messages that hold the same, equal to Flower's to the bit.

    Args:
        contents: of the replies, each with one record of metrics.
        key: whose value is the weight; it is left out.
    """
    records = [next(iter(records_of(content, MetricRecord).values())) for content in contents]
    total = sum(record[key] for record in records)  # type: ignore[misc]  # weights are numbers
    factors = [record[key] / total for record in records]  # type: ignore[operator]  # likewise
    mean = MetricRecord()
    for name in [name for name in records[0] if name != key]:
        values = [record[name] for record in records]
        if isinstance(values[0], list):
            columns = zip(*values, strict=True)
            mean[name] = [_dot(column, factors) for column in columns]
        else:
            mean[name] = _dot(values, factors)  # type: ignore[arg-type]  # all are numbers
    return mean


def _dot(values: Sequence[float], factors: list[float]) -> float:
    """One addition after the other: from Python 3.12 on, `sum` rounds less often."""
    found = values[0] * factors[0]
    for value, factor in zip(values[1:], factors[1:], strict=True):
        found += value * factor
    return found


def _mean_of(arrays: list[Array], factors: list[float]) -> npt.NDArray[Any]:
    found = _scaled(arrays[0].numpy(), factors[0])
    if not found.flags.c_contiguous:  # a reply of this process; those from elsewhere are
        found = np.ascontiguousarray(found)
    flat, product = found.reshape(-1), np.empty_like(found) if len(arrays) > 1 else found
    for array, factor in zip(arrays[1:], factors[1:], strict=True):
        if not isinstance(array, FileArray):  # without a new array for each client
            np.multiply(array.numpy(), factor, out=product)
            np.add(found, product, out=found)
            continue
        for start, piece in pieces(array):
            flat[start : start + piece.size] += piece * factor
    return found


def _scaled(value: npt.NDArray[Any], factor: float) -> npt.NDArray[Any]:
    """The product, in the array's own memory where that is ours to write to."""
    if value.flags.writeable and value.flags.owndata and value.dtype.kind == "f":
        value *= factor
        return value
    return np.asarray(value * factor)
