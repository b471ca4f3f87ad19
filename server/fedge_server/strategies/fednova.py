"""FedNova (Wang et al. 2020): the mean of normalised changes, so that who makes more steps counts no more.

"Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization", arXiv:2007.07481.
With p_k = n_k / n, the change D_k = w_k - w of client k, and its accumulated steps |a_k|_1
(`fedge.learning.terms.accumulated`; tau_k for plain SGD):

    w <- w + tau_eff sum_k p_k D_k / |a_k|_1,    tau_eff = sum_k p_k |a_k|_1.

The same, and linear in the w_k of clients with equal steps: with the mean m of all w_k by the weights
p_k / |a_k|_1 and s = tau_eff sum_k p_k / |a_k|_1, w <- w + s (m - w).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid

from fedge.config import Train
from fedge.learning.messages import ARRAYS, EXAMPLES, METRICS, from_record, to_record
from fedge.learning.terms import STEPS, Terms, accumulated
from fedge.wire.arrays import records_of
from fedge_server.strategies.fedavg import FedAvg
from fedge_server.strategies.mean import Mean


class FedNova(FedAvg):
    """Average changes by step, and go as far as all clients did on average."""

    terms = Terms(steps=True)

    def __init__(self, parameter_names: tuple[str, ...], train: Train, **kwargs: Any) -> None:
        """Know how clients step.

        Args:
            parameter_names: entries of the state that steps change; the others (buffers) are averaged.
            train: what clients are told; SGD.
            kwargs: FedAvg's own.

        Raises:
            ValueError: another optimiser, for which the paper has no such norm.
        """
        super().__init__(**kwargs)
        if train.optimizer != "sgd":
            raise ValueError(f"train.optimizer = {train.optimizer!r}: steps are normalised for 'sgd' alone")
        self.parameter_names = parameter_names
        self.accumulated: Callable[[int], float] = lambda steps: accumulated(steps, train)
        self.weights: ArrayRecord | None = None

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Remember the weights from which changes are measured."""
        self.weights = arrays
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The step of the normalised mean; replies may stand for several clients with equal steps."""
        by_step, by_examples = Mean(self.accumulate), Mean(self.accumulate)  # of parameters, and of buffers
        contents, n, a, n_over_a = [], 0.0, 0.0, 0.0  # sums over k of n_k, n_k |a_k|_1 and n_k / |a_k|_1
        for reply in replies:
            record = records_of(reply.content, ArrayRecord)[ARRAYS]
            n_k, tau_k = (float(_number(reply, name)) for name in (EXAMPLES, STEPS))
            a_k = self.accumulated(int(tau_k))
            n, a, n_over_a = n + n_k, a + n_k * a_k, n_over_a + n_k / a_k
            by_step.add({name: record[name] for name in self.parameter_names}, n_k / a_k)
            by_examples.add({name: v for name, v in record.items() if name not in self.parameter_names}, n_k)
            contents.append(reply.content)
        if not contents or self.weights is None:
            return None, None
        s = a / n * (n_over_a / n)
        mean = from_record({**by_step.result(), **by_examples.result()})
        found = {
            name: (w + s * np.subtract(mean[name], w)).astype(w.dtype)
            if name in self.parameter_names
            else mean[name]
            for name, w in from_record(self.weights).items()
        }
        return to_record(found, shared=False), self.train_metrics_aggr_fn(contents, self.weighted_by_key)


def _number(reply: Message, name: str) -> float:
    said = records_of(reply.content, MetricRecord)[METRICS][name]
    assert isinstance(said, (int, float))  # noqa: S101 - as was checked
    return said
