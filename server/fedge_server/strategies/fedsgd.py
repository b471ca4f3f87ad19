"""FedSGD (McMahan et al. 2017, section 2): clients send gradients, the server's optimiser steps.

g = sum_k n_k / n * g_k;  w <- step(w, g). With plain SGD and all clients, one round is one step of
full-batch gradient descent on the pooled data.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid

from fedge.learning.messages import from_record, to_record
from fedge_server.strategies.fedavg import FedAvg

OPTIMIZERS: dict[str, Any] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adagrad": torch.optim.Adagrad,
}


class FedSgd(FedAvg):
    """Average the clients' gradients by their numbers of examples and let an optimiser of torch step."""

    def __init__(
        self,
        parameter_names: tuple[str, ...],
        optimizer: str = "sgd",
        learning_rate: float = 0.1,
        momentum: float = 0.0,
        **kwargs: Any,
    ) -> None:
        """Set the server's optimiser.

        Args:
            parameter_names: entries of the state that have gradients; the others (buffers) are averaged.
            optimizer: 'sgd', 'adam' or 'adagrad'.
            learning_rate: of the server's step, above 0.
            momentum: sgd only, 0 or more and below 1.
            kwargs: FedAvg's own.

        Raises:
            ValueError: a value is out of range.
        """
        super().__init__(**kwargs)
        if optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer {optimizer!r} is not one of {', '.join(OPTIMIZERS)}")
        if not learning_rate > 0 or not 0 <= momentum < 1:
            raise ValueError(f"learning_rate {learning_rate} must be above 0, momentum {momentum} in [0, 1)")
        self.parameter_names = parameter_names
        self.optimizer = optimizer
        self.learning_rate = float(learning_rate)
        self.momentum = float(momentum)
        self.moments: dict[str, npt.NDArray[np.generic]] = {}  # the optimiser's own state, by PARAMETER|NAME
        self.weights: ArrayRecord | None = None

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Remember the weights at which the gradients will be taken, and ask for them."""
        self.weights = arrays
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average the gradients and make one step from the remembered weights."""
        mean, metrics = super().aggregate_train(server_round, replies)
        if mean is None or self.weights is None:
            return None, metrics
        gradients, current = from_record(mean), from_record(self.weights)
        stepped = self._step(
            {name: current[name] for name in self.parameter_names},
            {name: gradients[name].astype(current[name].dtype) for name in self.parameter_names},
        )
        return to_record({name: stepped.get(name, gradients[name]) for name in current}), metrics

    def _step(
        self, weights: dict[str, npt.NDArray[np.generic]], gradients: dict[str, npt.NDArray[np.generic]]
    ) -> dict[str, npt.NDArray[np.generic]]:
        parameters = {
            name: torch.nn.Parameter(torch.from_numpy(value.copy())) for name, value in weights.items()
        }
        extra = {"momentum": self.momentum} if self.optimizer == "sgd" else {}
        optimizer = OPTIMIZERS[self.optimizer](parameters.values(), lr=self.learning_rate, **extra)
        for name, parameter in parameters.items():
            parameter.grad = torch.from_numpy(gradients[name])
            kept = {
                key.partition("|")[2]: torch.from_numpy(np.array(value))
                for key, value in self.moments.items()
                if key.partition("|")[0] == name
            }
            if kept:
                optimizer.state[parameter] = kept
        optimizer.step()
        self.moments = {
            f"{name}|{key}": value.numpy().copy()
            for name, parameter in parameters.items()
            for key, value in optimizer.state[parameter].items()
            if isinstance(value, torch.Tensor)
        }
        return {name: parameter.detach().numpy() for name, parameter in parameters.items()}
