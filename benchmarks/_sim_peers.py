"""The contestants that are not fedge: a plain torch loop, pfl-research, Flower's simulation on Ray.

Each does what its own documentation shows. pfl: `SimulatedBackend`, `FederatedAveraging`, a `PyTorchModel`,
users' tensors in memory and their batches cached between rounds, no evaluation. Flower: `FedAvg`, a ClientApp
that loads the arrays into its network, one CPU for each client, so that there are as many actors as cores.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import cache, lru_cache
from typing import Any

import torch
from _sim_work import BATCH, Data, Turn, Work, private_stdout, train, turns, work
from torch import nn
from torch.nn import functional as F


def plain_loop(chosen: Work, answers: Any) -> None:
    """One client after the other: load the global state, train, add to a weighted sum."""
    data = Data.made(chosen.side, chosen.clients * chosen.samples)
    shares = [data.client(i, chosen.samples) for i in range(chosen.clients)]
    network = chosen.net()
    state = {name: value.clone() for name, value in network.state_dict().items()}
    for turn in turns(answers):
        while True:
            total = {name: torch.zeros_like(value) for name, value in state.items()}
            steps = examples = 0
            for x, y in shares:
                network.load_state_dict(state)
                steps += train(network, x, y, chosen.learning_rate)[0]
                examples += len(y)
                for name, value in network.state_dict().items():
                    total[name].add_(value, alpha=len(y))
            state = {name: value / examples for name, value in total.items()}
            if turn.done(clients=len(shares), steps=steps, examples=examples):
                break
        if turn.first:
            network.load_state_dict(state)
            turn.found["loss"] = data.loss(network)


def pfl(chosen: Work, answers: Any) -> None:
    """Apple's pfl-research."""
    import numpy as np
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.pytorch import PyTorchTensorDataset
    from pfl.data.sampling import get_user_sampler
    from pfl.hyperparam import NNTrainHyperParams
    from pfl.metrics import Metrics
    from pfl.model.pytorch import PyTorchModel

    data = Data.made(chosen.side, chosen.clients * chosen.samples)
    network = chosen.net()

    def loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(network(x), y)

    network.loss, network.metrics = loss, lambda *_, **__: {}  # type: ignore[assignment]

    @cache  # a user's batches are cut once and kept
    def user(number: int) -> Any:
        return PyTorchTensorDataset(data.client(number, chosen.samples), user_id=str(number))

    asked = turns(answers)

    class Wait(TrainingProcessCallback):
        """Goes on when the next turn is asked for."""

        def __init__(self) -> None:
            self._turn: Turn | None = next(asked, None)

        def after_central_iteration(self, *_: Any, **__: Any) -> tuple[bool, Metrics]:
            assert self._turn is not None
            clients = chosen.clients
            if self._turn.done(
                clients=clients, steps=clients * chosen.steps, examples=clients * chosen.samples
            ):
                if self._turn.first:
                    self._turn.found["loss"] = data.loss(network)
                self._turn = next(asked, None)
            return self._turn is None, Metrics()

    np.random.seed(0)  # pfl draws from it
    users = FederatedDataset(user, get_user_sampler("minimize_reuse", list(range(chosen.clients))))
    model = PyTorchModel(network, torch.optim.SGD, torch.optim.SGD(network.parameters(), lr=1.0))
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=10**9,
            evaluation_frequency=10**9,
            train_cohort_size=chosen.clients,
            val_cohort_size=None,
        ),
        backend=SimulatedBackend(training_data=users, val_data=users),
        model=model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=chosen.learning_rate, local_batch_size=BATCH
        ),
        model_eval_params=None,
        callbacks=[Wait()],
        send_metrics_to_platform=False,
    )


@lru_cache(maxsize=1)
def _once(name: str, clients: int) -> tuple[Work, Data, nn.Module]:
    """What an actor of Ray keeps between its clients."""
    torch.set_num_threads(1)
    chosen = work(name, clients)
    return chosen, Data.made(chosen.side, clients * chosen.samples), chosen.net()


def _flower_client(name: str, clients: int) -> Any:
    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp

    app = ClientApp()

    @app.train()
    def train_client(message: Any, context: Any) -> Any:
        chosen, data, network = _once(name, clients)
        network.load_state_dict(message.content["arrays"].to_torch_state_dict())
        x, y = data.client(int(context.node_config["partition-id"]), chosen.samples)
        _, loss = train(network, x, y, chosen.learning_rate)
        metrics = MetricRecord({"num-examples": len(y), "train_loss": loss})
        content = RecordDict({"arrays": ArrayRecord(network.state_dict()), "metrics": metrics})
        return Message(content, reply_to=message)

    return app


def flower(chosen: Work, answers: Any) -> None:
    """Flower's simulation, whose backend is Ray."""
    from flwr.app import ArrayRecord
    from flwr.serverapp import ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    server = ServerApp()

    @server.main()
    def main(grid: Any, context: Any) -> None:
        _, data, network = _once(chosen.name, chosen.clients)
        strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0, min_available_nodes=chosen.clients)
        state, clients = ArrayRecord(network.state_dict()), chosen.clients
        for turn in turns(answers):
            while True:
                state = strategy.start(grid=grid, initial_arrays=state, num_rounds=1, timeout=600).arrays
                if turn.done(
                    clients=clients, steps=clients * chosen.steps, examples=clients * chosen.samples
                ):
                    break
            if turn.first:
                network.load_state_dict(state.to_torch_state_dict())
                turn.found["loss"] = data.loss(network)

    run_simulation(
        server,
        _flower_client(chosen.name, chosen.clients),
        num_supernodes=chosen.clients,
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
    )


CONTESTANTS: Mapping[str, Callable[[Work, Any], None]] = {"loop": plain_loop, "pfl": pfl, "flower": flower}


def main(arguments: list[str]) -> None:
    """CONTESTANT WORK CLIENTS."""
    contestant, name, clients = arguments
    answers = private_stdout()
    torch.set_num_threads(1)
    CONTESTANTS[contestant](work(name, int(clients)), answers)


if __name__ == "__main__":
    main(sys.argv[1:])
