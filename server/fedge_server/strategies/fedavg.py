"""FedAvg's weighted mean (McMahan et al. 2017), formed as the updates come: one accumulator, whoever answers.

sum_k n_k w_k / sum_k n_k. Flower's keeps every reply until all are there, and one more copy of the model.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp import strategy as flower

from fedge.wire.arrays import put, records_of, table_of
from fedge_server.strategies.mean import Accumulate, Mean


class FedAvg(flower.FedAvg):
    """Flower's FedAvg with another `aggregate_train`, which looks at each reply once, in any order."""

    accumulate: Accumulate = "float32"  # precision of the sums

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The mean of the replies' arrays and metrics, weighted by their numbers of examples."""
        mean, contents = Mean(self.accumulate), []
        for reply in replies:
            if reply.has_error():
                continue
            content = reply.content
            metrics = next(iter(records_of(content, MetricRecord).values()))
            weight = float(table_of(metrics)[self.weighted_by_key])  # type: ignore[arg-type]  # a number
            mean.add(next(iter(records_of(content, ArrayRecord).values())), weight)
            contents.append(content)  # for its metrics: the round loop takes the arrays out of it
        if not contents:
            return None, None
        return mean.result(), self.train_metrics_aggr_fn(contents, self.weighted_by_key)


class FedProx(flower.FedProx, FedAvg):
    """Flower's FedProx over the mean above."""


class _ParametersApart(FedAvg):
    """The mean above, of which the class that steps sees the parameters alone."""

    parameter_names: tuple[str, ...] | None = None  # what the server steps; None: every entry
    _averaged: Mapping[str, Array] = MappingProxyType({})  # this round's mean of the others

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The mean of the parameters; that of the other entries is put aside."""
        mean, metrics = super().aggregate_train(server_round, replies)
        if mean is None or self.parameter_names is None:
            return mean, metrics
        self._averaged = {name: mean[name] for name in mean if name not in self.parameter_names}
        return _only(mean, self.parameter_names), metrics


class Stepped(_ParametersApart):
    """Steps of the server for parameters alone; the other entries of the state take the clients' mean.

    A running variance has no gradient: momentum carries it below 0, and the model answers with NaN. Reddi et
    al. 2021, "Adaptive Federated Optimization", ICLR, step trainable weights too, and nothing else.
    """

    current_arrays: Any  # where the step begins; Flower's classes keep a record or a dict of arrays

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send all, and step from the parameters."""
        sent = super().configure_train(server_round, arrays, config, grid)
        if self.parameter_names is not None:
            self.current_arrays = _only(self.current_arrays, self.parameter_names)
        return sent

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The parameters, stepped, and the mean of the other entries."""
        stepped, metrics = super().aggregate_train(server_round, replies)
        averaged, self._averaged = self._averaged, {}
        if stepped is not None:
            put(stepped, averaged)
        return stepped, metrics


def _only(arrays: Any, names: Container[str]) -> Any:
    """The entries of these names, in their order, of a record or a dict."""
    kept = {name: array for name, array in arrays.items() if name in names}
    if isinstance(arrays, dict):
        return kept
    record = ArrayRecord()
    put(record, kept)
    return record


class FedAvgM(Stepped, flower.FedAvgM, _ParametersApart):
    """Flower's FedAvgM over the mean above."""


class FedAdagrad(Stepped, flower.FedAdagrad, _ParametersApart):
    """Flower's FedAdagrad over the mean above."""


class FedAdam(Stepped, flower.FedAdam, _ParametersApart):
    """Flower's FedAdam over the mean above."""


class FedYogi(Stepped, flower.FedYogi, _ParametersApart):
    """Flower's FedYogi over the mean above."""


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
