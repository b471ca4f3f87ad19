"""Everything a simulation needs before its first round, and every check that can be made by then."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from flwr.app import Context, Message

from fedge.config import Config
from fedge.dataset import Dataset, Examples, Indices
from fedge.errors import ConfigError
from fedge.learning.augment import augment
from fedge.learning.messages import Instructions
from fedge.statistics import Moments
from fedge.task import Task, resolve
from fedge_client import app as client_app
from fedge_server import strategies
from fedge_server.compression import check_possible
from fedge_server.data import ServerData, server_part, source_of, split_of
from fedge_server.rounds.stopping import check_target
from fedge_simulations.grid import Duration, SequentialGrid, UserConfig
from fedge_simulations.partition import deal


@dataclass(frozen=True, slots=True)
class World:
    """A data set divided among a server and clients."""

    config: Config
    task: Task
    dataset: Dataset
    server: ServerData
    clients: tuple[Indices, ...]  # positions of each client's training examples
    names: tuple[str, ...]  # of the clients

    def grid(self, run_config: UserConfig) -> SequentialGrid:
        """A Grid over these clients."""
        nodes: list[UserConfig] = [
            {"partition-id": i, "num-partitions": len(self.clients)} for i in range(len(self.clients))
        ]
        return SequentialGrid(client_app.build(self.share_of), nodes, run_config, self.duration())

    def share_of(self, context: Context, instructions: Instructions) -> tuple[Task, Examples]:
        """The task and the client's part of the data set (the ClientApp's source in a simulation)."""
        return self.task, self.dataset.examples.take(self.clients[int(context.node_config["partition-id"])])

    def duration(self) -> Duration:
        """Simulated seconds of a message: examples times passes times the client's own speed.

        Speeds are log-normal with median 1, decided by the seed; without a backward pass a third is counted.
        """
        settings = self.config.clients
        rng = np.random.default_rng([self.config.seed, 0x5BEED])
        slowness = np.exp(rng.normal(0.0, settings.speed_sigma, len(self.clients)))
        seconds = np.array([len(part) for part in self.clients]) * settings.seconds_per_example * slowness

        def of(message: Message) -> float:
            passes = self.config.train.epochs if message.metadata.message_type == "train" else 1 / 3
            return float(seconds[message.metadata.dst_node_id - 1] * passes)

        return of

    def without(self, client: int) -> World:
        """The same world without one client, tested on all data of that client, held out or not."""
        assert self.dataset.client is not None  # noqa: S101 - `prepare` has refused other partitions
        members = np.flatnonzero(self.dataset.client == client)
        test = self.dataset.examples.take(members)
        rest = [i for i in range(len(self.clients)) if i != client]
        return replace(
            self,
            server=replace(self.server, test=test),
            clients=tuple(self.clients[i] for i in rest),
            names=tuple(self.names[i] for i in rest),
        )


def prepare(config: Config) -> World:
    """Read the data, deal it out, and check all that a first round would trip over.

    Raises:
        ConfigError: a key or value that cannot work with this task and data.
        DataError: the data cannot be used.
    """
    task = resolve(config.task)
    _check_leave_one_out(config)
    dataset = task.read(source_of(config))
    parts = split_of(config, dataset)
    clients = tuple(deal(dataset, parts.train, config.clients, config.seed))
    if config.evaluate.leave_one_client_out and len(clients) < 2:
        raise ConfigError("evaluate.leave_one_client_out: the data has one client; nobody is left to train")
    if config.rounds.min_updates > max(int(len(clients) * config.rounds.fraction), 1):
        raise ConfigError(
            f"rounds.min_updates = {config.rounds.min_updates}: a round asks only "
            f"{max(int(len(clients) * config.rounds.fraction), 1)} of {len(clients)} clients"
        )
    natural = config.clients.partition == "natural"
    names = dataset.clients if natural else tuple(str(i) for i in range(len(clients)))
    world = World(config, task, dataset, server_part(dataset, parts), clients, names)
    _check_learnable(world)
    if config.tiers:
        check_possible(task, dataset.spec, config, world.server.proxy.x, gate=world.server.gate)
    return world


def _check_leave_one_out(config: Config) -> None:
    if not config.evaluate.leave_one_client_out:
        return
    if config.clients.partition != "natural":
        raise ConfigError("evaluate.leave_one_client_out: needs clients.partition = 'natural'")
    if config.rounds.target is not None or config.rounds.patience is not None:
        raise ConfigError(
            "evaluate.leave_one_client_out: leave rounds.target and rounds.patience out; they would stop "
            "each run by its score on the very client that is left out"
        )


def _check_learnable(world: World) -> None:
    """Build the model and the strategy and push one example through, before anything is written."""
    config, spec = world.config, world.dataset.spec
    name = config.model.name or world.task.default_model
    moments = Moments.of(spec.zeros(2), spec) if config.model.standardise else None
    preprocess = world.task.preprocess(spec, moments, config.model.filter)
    network = world.task.model(config.model.name)(spec)
    names = tuple(name for name, _ in network.named_parameters())
    check_target(config.rounds, config.evaluate.metrics, spec.classes)
    strategies.build(config, clients=len(world.clients), parameter_names=names)
    try:
        with torch.no_grad():
            x = preprocess(torch.from_numpy(spec.zeros(2)))
            for names_of in (config.train.augment, config.compress.distil.augment):
                augment(x, names_of, torch.arange(len(x)))
            logits = network.eval()(x)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"model {name!r} or an augmentation does not fit the data: {error}") from error
    if tuple(logits.shape) != (2, spec.classes):
        raise ConfigError(
            f"model {name!r}: gives {tuple(logits.shape)} for 2 examples; it must give (2, {spec.classes})"
        )
