"""FedDF (Lin et al. 2020): clients' models are fused by distilling their ensemble on the server's own data.

"Ensemble Distillation for Robust Model Fusion in Federated Learning", arXiv:2006.07242, algorithms 1 and 3.
Clients may have different architectures. For each architecture the server averages the models of its clients,
and trains the average to answer as all clients' models do together, whatever their architecture:

    x_p <- sum_k n_k / n_p x_k;    x_p <- distil(1 / |S| sum_k f(x_k, d) to f(x_p, d)) over the proxy data d.

Labels of the proxy data are not used. The run's own model is one of these architectures, or one that nobody
has, which then learns from the ensemble alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from torch import nn

from fedge.config import Config, Distil
from fedge.errors import CompressionError
from fedge.learning import draws, local
from fedge.learning.messages import ARRAYS, CONFIG, EXAMPLES, METRICS, Instructions, from_record, to_record
from fedge.learning.state import arrays_of, load_arrays
from fedge.task import Task
from fedge.wire.arrays import records_of
from fedge_server.compression.distil import distil, logits, preprocessed
from fedge_server.data import ServerData
from fedge_server.strategies.fedavg import FedAvg
from fedge_server.strategies.mean import Mean

Arrays = Mapping[str, npt.NDArray[np.generic]]


class FedDf(FedAvg):
    """Average by architecture, then learn from all clients' answers."""

    def __init__(
        self,
        run: Config,
        task: Task | None,
        data: ServerData | None,
        models: str = "",
        epochs: int = 20,
        learning_rate: float = 0.001,
        **kwargs: Any,
    ) -> None:
        """Know the architectures and the proxy data.

        Args:
            run: the run's configuration.
            task: whose architectures these are.
            data: of the server.
            models: names of the clients' architectures, with commas between them: client i has number
                i modulo how many there are; empty: all have the run's own.
            epochs: passes over the proxy data in a round.
            learning_rate: Adam's, the peak of one cycle.
            kwargs: FedAvg's own.

        Raises:
            ValueError: there is too little proxy data, or no such architecture.
        """
        super().__init__(**kwargs)
        if task is None or data is None or len(data.proxy) < 2:
            raise ValueError("needs proxy data on the server; raise evaluate.proxy_fraction")
        if epochs < 1 or not learning_rate > 0:
            raise ValueError(f"epochs {epochs} must be at least 1, learning_rate {learning_rate} above 0")
        self.own = run.model.name or task.default_model
        self.names = tuple(name.strip() for name in models.split(",")) if models else (self.own,)
        _check(run, task, self.own, self.names)
        self.blank: Callable[[str], nn.Module] = lambda name: copy.deepcopy(
            local.first(task, name, data.spec, run.seed)
        )
        self.inputs: Callable[[Instructions], torch.Tensor] = lambda told: preprocessed(
            task.preprocess(data.spec, told.moments, told.noise_filter), data.proxy.x
        )
        self.settings: Callable[[], Distil] = lambda: Distil(
            mode="soft", temperature=1.0, epochs=epochs, learning_rate=learning_rate
        )
        self.seed = run.seed
        # By architecture: its state; all but the run's own are saved with the round here.
        self.others = {
            f"{name}|{entry}": value
            for name in self.names
            if name != self.own
            for entry, value in arrays_of(self.blank(name)).items()
        }
        self.mine: ArrayRecord | None = None
        self.told: Callable[[], Instructions] | None = None

    def model_of(self, node_id: int) -> str:
        """The architecture of a client."""
        return self.names[node_id % len(self.names)]

    @property
    def like(self) -> Callable[[int], Arrays] | None:
        """The state of a client's model, against which its reply is held; None: all have the run's own."""
        if set(self.names) == {self.own}:
            return None
        return lambda node_id: self._state(self.model_of(node_id))

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send to each client the state of its own architecture."""
        self.mine = arrays
        sent = super().configure_train(server_round, arrays, config, grid)
        told = Instructions.of_config(config)
        self.told = lambda: told
        return self._by_model(sent, MessageType.TRAIN)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Let each client evaluate its own architecture."""
        self.mine = arrays
        return self._by_model(
            super().configure_evaluate(server_round, arrays, config, grid), MessageType.EVALUATE
        )

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fuse each architecture; the run's own is the result."""
        valid, _ = self._check_and_log_replies(replies, is_train=True, validate=False)
        if not valid or self.told is None:
            return None, None
        x = self.inputs(self.told())
        answers = torch.stack([self._answers(message, x) for message in valid]).mean(0)
        found: dict[str, Arrays] = {}
        for name in dict.fromkeys((self.own, *self.names)):
            seed = draws.plain_key(self.seed, server_round) & (2**63 - 1)
            student = self._loaded(name, self._average(name, valid))
            try:
                student = distil(answers, student, x, None, self.settings(), seed=seed)
            except CompressionError:  # it ceased to be finite: the round's model is the average
                student = self._loaded(name, self._average(name, valid))
            found[name] = arrays_of(student)
        self.others = {
            f"{name}|{entry}": value
            for name in found
            if name != self.own
            for entry, value in found[name].items()
        }
        contents = [message.content for message in valid]
        return to_record(found[self.own], shared=False), self.train_metrics_aggr_fn(
            contents, self.weighted_by_key
        )

    def _answers(self, reply: Message, x: torch.Tensor) -> torch.Tensor:
        """What a client's model answers to the proxy data: (N, C)."""
        state = from_record(records_of(reply.content, ArrayRecord)[ARRAYS])
        return logits(self._loaded(self.model_of(reply.metadata.src_node_id), state).eval(), x)

    def _average(self, name: str, replies: list[Message]) -> Arrays:
        """The mean of an architecture's clients, by examples; its state, where none has answered."""
        mean = Mean(self.accumulate)
        for reply in replies:
            if self.model_of(reply.metadata.src_node_id) == name:
                examples = records_of(reply.content, MetricRecord)[METRICS][EXAMPLES]
                mean.add(records_of(reply.content, ArrayRecord)[ARRAYS], float(examples))  # type: ignore[arg-type]
        return from_record(mean.result()) or self._state(name)

    def _loaded(self, name: str, state: Arrays) -> nn.Module:
        model = self.blank(name)
        load_arrays(model, {entry: np.asarray(value, np.float32) for entry, value in state.items()})
        return model

    def _state(self, name: str) -> Arrays:
        if name == self.own:
            return {} if self.mine is None else from_record(self.mine)
        return {
            key.partition("|")[2]: value
            for key, value in self.others.items()
            if key.partition("|")[0] == name
        }

    def _by_model(self, sent: Iterable[Message], kind: str) -> list[Message]:
        """The messages, with the state and the name of each client's own architecture."""
        messages, contents = list(sent), dict[str, RecordDict]()
        for message in messages:
            name = self.model_of(message.metadata.dst_node_id)
            if name not in contents:
                config = records_of(message.content, ConfigRecord)[CONFIG]
                told = ConfigRecord({**config, "model": name})
                contents[name] = RecordDict({ARRAYS: to_record(self._state(name)), CONFIG: told})
        return [
            Message(contents[self.model_of(node)], node, kind)
            for node in (message.metadata.dst_node_id for message in messages)
        ]


def _check(run: Config, task: Task, own: str, names: tuple[str, ...]) -> None:
    if unknown := [name for name in names if name not in task.models]:
        raise ValueError(f"models {unknown} are none of task {task.name!r}: {', '.join(task.models)}")
    for key, is_set in (
        ("communication.codec", run.communication.codec),
        ("evaluate.anomalies", run.evaluate.anomalies),
    ):
        if is_set and set(names) != {own}:
            raise ValueError(
                f"models {', '.join(names)}: {key} is for one architecture; leave one of them out"
            )
