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
from fedge_server.strategies.fedavg import FedAvg, weighted_mean


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
        valid, _ = self._check_and_log_replies(replies, is_train=True, validate=False)
        if not valid or self.weights is None:
            return None, None
        records = [records_of(message.content, ArrayRecord)[ARRAYS] for message in valid]
        n, tau = (_numbers(valid, name) for name in (EXAMPLES, STEPS))
        a = [self.accumulated(int(tau_k)) for tau_k in tau]
        by_step = [n_k / a_k for n_k, a_k in zip(n, a, strict=True)]
        s = sum(n_k * a_k for n_k, a_k in zip(n, a, strict=True)) / sum(n) * (sum(by_step) / sum(n))
        before, found = from_record(self.weights), dict[str, np.ndarray[Any, Any]]()
        for name, w in before.items():
            stepped = name in self.parameter_names
            (m,) = weighted_mean(
                [_only(record, name) for record in records], by_step if stepped else n
            ).values()
            found[name] = (w + s * np.subtract(m.numpy(), w)).astype(w.dtype) if stepped else m.numpy()
        contents = [message.content for message in valid]
        return to_record(found, shared=False), self.train_metrics_aggr_fn(contents, self.weighted_by_key)


def _numbers(replies: list[Message], name: str) -> list[float]:
    said = (records_of(message.content, MetricRecord)[METRICS][name] for message in replies)
    return [float(value) for value in said]  # type: ignore[arg-type]  # numbers, as was checked


def _only(record: ArrayRecord, name: str) -> ArrayRecord:
    one = ArrayRecord()
    one[name] = record[name]
    return one
