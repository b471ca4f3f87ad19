"""FedAvg's weighted mean (McMahan et al. 2017), formed as the updates come: one accumulator, whoever answers.

sum_k n_k w_k / sum_k n_k. Flower's keeps every reply until all are there, and one more copy of the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower

from fedge.wire.arrays import records_of, table_of
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


class FedAvgM(flower.FedAvgM, FedAvg):
    """Flower's FedAvgM over the mean above."""


class FedAdagrad(flower.FedAdagrad, FedAvg):
    """Flower's FedAdagrad over the mean above."""


class FedAdam(flower.FedAdam, FedAvg):
    """Flower's FedAdam over the mean above."""


class FedYogi(flower.FedYogi, FedAvg):
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
