"""SCAFFOLD (Karimireddy et al. 2020), option II: control variates correct the drift of clients' steps.

"SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", arXiv:1910.06378. Client i steps along
g_i(y) - c_i + c and sends y_i and the change of c_i (`fedge_client.keeping`); of N clients those in S answer:

    x <- x + eta_g / |S| sum_i (y_i - x),    c <- c + |S| / N * 1 / |S| sum_i (c_i+ - c_i).

c stays the mean of all c_i only if a change that was not counted does not stay on the device either. So the
server remembers whose answer it has not counted, and from which round on, and tells them when it next asks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fedge.config import Train
from fedge.learning.messages import ARRAYS, CONFIG, EXAMPLES, METRICS, from_record, to_record
from fedge.learning.terms import CONTROL, VOID, Terms
from fedge.wire.arrays import records_of
from fedge_server.strategies.fedavg import FedAvg
from fedge_server.strategies.mean import Mean

Weighting = Literal["clients", "examples"]


class Scaffold(FedAvg):
    """Average weights and the changes of control variates."""

    terms = Terms(control=True)

    def __init__(
        self,
        parameter_names: tuple[str, ...],
        population: int,
        train: Train,
        server_learning_rate: float = 1.0,
        weighting: str = "clients",
        **kwargs: Any,
    ) -> None:
        """Set the server's step.

        Args:
            parameter_names: entries of the state that have gradients; the others (buffers) are averaged.
            population: N.
            train: what clients are told; SGD.
            server_learning_rate: eta_g, above 0.
            weighting: 'clients', each alike as in the paper; or 'examples', as in FedAvg.
            kwargs: FedAvg's own.

        Raises:
            ValueError: a value is out of range, or clients do not step by SGD.
        """
        super().__init__(**kwargs)
        if train.optimizer != "sgd":
            raise ValueError(
                f"train.optimizer = {train.optimizer!r}: what clients send is a gradient for 'sgd' alone"
            )
        if not server_learning_rate > 0 or weighting not in ("clients", "examples"):
            raise ValueError(
                f"server_learning_rate {server_learning_rate} must be above 0, weighting {weighting!r} "
                "'clients' or 'examples'"
            )
        self.parameter_names = parameter_names
        self.population = population
        self.server_learning_rate = float(server_learning_rate)
        self.weighting = weighting
        self.weights: ArrayRecord | None = None
        self.control: dict[str, npt.NDArray[Any]] = {}  # c; none before the first round
        self.asked = _table({})  # (m, 2): node, and the round in which its answer is still to come
        self.void = _table({})  # (m, 2): node, and the round from which on nothing of it was counted

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send c too, and tell those whose last answers were not counted."""
        state = from_record(arrays)
        self.weights = arrays
        self.control = self.control or {name: np.zeros_like(state[name]) for name in self.parameter_names}
        void = {**_dict(self.asked), **_dict(self.void)}  # who was asked in a round that was given up
        sent = list(super().configure_train(server_round, arrays, config, grid))
        control = to_record(self.control)
        for message in sent:
            message.content[CONTROL] = control
        self.void = _table(void)
        self.asked = _table({message.metadata.dst_node_id: server_round for message in sent})
        return [
            _told(message, void[node]) if (node := message.metadata.dst_node_id) in void else message
            for message in sent
        ]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Step along the mean change, and move c by the mean change of those of all clients."""
        mean_x, mean_c = Mean(self.accumulate), Mean(self.accumulate)
        contents, counted = [], set()
        for reply in replies:
            records = records_of(reply.content, ArrayRecord)
            said = records_of(reply.content, MetricRecord)[METRICS][EXAMPLES]
            weight = float(said) if self.weighting == "examples" else 1.0  # type: ignore[arg-type]  # a number
            mean_x.add(records[ARRAYS], weight)
            mean_c.add(records[CONTROL], weight)
            contents.append(reply.content)
            counted.add(reply.metadata.src_node_id)
        if not contents or self.weights is None:
            return None, None
        mean, change, before = (
            from_record(found) for found in (mean_x.result(), mean_c.result(), self.weights)
        )
        for name in self.parameter_names:
            x, c = before[name], self.control[name]
            far = self.server_learning_rate * np.subtract(mean[name], x)
            mean[name] = (x + far).astype(x.dtype)
            self.control[name] = (c + np.multiply(change[name], len(counted) / self.population)).astype(
                c.dtype
            )
        self._count(counted)
        return to_record(mean, shared=False), self.train_metrics_aggr_fn(contents, self.weighted_by_key)

    def _count(self, counted: set[int]) -> None:
        """Forget what was void of those that answered, and remember who did not."""
        void = {**_dict(self.asked), **_dict(self.void)}  # the earlier round stays where there are two
        self.void = _table({node: number for node, number in void.items() if node not in counted})
        self.asked = _table({})


def _told(message: Message, void: int) -> Message:
    """The message, with a config of its own."""
    content = RecordDict(dict(message.content))
    content[CONFIG] = ConfigRecord({**records_of(content, ConfigRecord)[CONFIG], VOID: void})
    metadata = message.metadata
    return Message(content, metadata.dst_node_id, metadata.message_type)


def _table(rounds: dict[int, int]) -> npt.NDArray[np.uint64]:
    """As an array, which is saved with the round; node ids have 64 bits."""
    return np.array(sorted(rounds.items()), np.uint64).reshape(-1, 2)


def _dict(table: npt.NDArray[np.uint64]) -> dict[int, int]:
    return {int(node): int(number) for node, number in table}
