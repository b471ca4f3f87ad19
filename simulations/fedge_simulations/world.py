"""Everything a simulation needs before its first round, and every check that can be made by then."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from flwr.app import Context

from fedge.config import Config
from fedge.dataset import Dataset, Examples
from fedge.errors import ConfigError
from fedge.holdout import places
from fedge.learning.augment import augment
from fedge.learning.messages import Instructions
from fedge.noise import derived_key
from fedge.statistics import Moments
from fedge.task import Task, resolve
from fedge_client import app as client_app
from fedge_server import strategies
from fedge_server.app import HOME
from fedge_server.compression import check_possible
from fedge_server.compression.sources import check_source
from fedge_server.data import ServerData, server_part, source_of, split_of
from fedge_server.privacy.protection import expected_clients
from fedge_server.privacy.rules import check_model, check_population
from fedge_server.rounds.sampling import cohort_size
from fedge_server.rounds.stopping import check_target
from fedge_simulations.engine import Engine
from fedge_simulations.grid import ClientCall, UserConfig, VectorGrid
from fedge_simulations.lazy import Lazy
from fedge_simulations.partition import people
from fedge_simulations.population import Population
from fedge_simulations.scenario import Scenario, check
from fedge_simulations.scenario.backdoor import brightest
from fedge_simulations.states import FOLDER, States
from fedge_simulations.summing import Holders
from fedge_simulations.trainers import OneByOne, Trainers, hand_over


@dataclass(frozen=True, slots=True)
class World:
    """A data set divided among a server and clients."""

    config: Config
    task: Task
    dataset: Dataset
    server: ServerData
    clients: Population  # positions of each client's training examples
    names: Sequence[str]  # of the clients

    def grid(
        self,
        run_config: UserConfig,
        *,
        around: Callable[[ClientCall], ClientCall] | None = None,
        trainers: Trainers | None = None,
    ) -> VectorGrid:
        """A Grid over these clients, which keep what they remember in the run's home.

        Args:
            run_config: of the run.
            around: what every client's app is wrapped in, such as a client mod; then the app really runs.
            trainers: does the clients' jobs; None: as the configuration says.
        """
        home = Path(str(run_config[HOME])) if run_config.get(HOME) else None
        course = self.course(home)
        app = client_app.build(lambda *asked: self.share_at(grid, *asked), hand_over, _repeatable_secret)
        grid = VectorGrid(
            app if around is None else around(app),
            self.node_configs(),
            run_config,
            trainers=trainers or self.trainers(home),
            course=course,
            holders=self.holders(course),
            sums=around is None,
            states=States(home / FOLDER if home else None),
        )
        return grid

    def holders(self, course: Scenario) -> Holders:
        """Who holds what, and keeps what of it back."""
        share, examples = self.config.evaluate.client_holdout, self.dataset.examples
        held_out = places(examples.x, self.config.seed) if share else None
        return Holders(self.task, examples, self.clients, course, held_out, share)

    def trainers(self, home: Path | None = None) -> Trainers:
        """Who does the clients' jobs, as the configuration says; what it measures is kept in that folder."""
        settings = self.config.simulation
        if settings.engine != "vector":
            return OneByOne()
        return Engine(settings, self.dataset.examples, rounds=self.config.rounds.count, folder=home)

    def node_configs(self) -> Sequence[UserConfig]:
        """What Flower's own simulation tells each of its nodes."""
        count = len(self.clients)
        return Lazy(count, lambda i: {"partition-id": i, "num-partitions": count})

    def share_of(self, context: Context, instructions: Instructions) -> tuple[Task, Examples]:
        """The task and the client's part of the data set (the ClientApp's source in a simulation)."""
        return self.task, self.dataset.examples.take(self.clients[int(context.node_config["partition-id"])])

    def share_at(
        self, grid: VectorGrid, context: Context, instructions: Instructions
    ) -> tuple[Task, Examples]:
        """The same, as much of it as the client holds by the Grid's clock, and as it believes it to be."""
        own = self.dataset.examples.take(grid.held_by(context.node_id))
        return self.task, grid.believed_by(context.node_id, own, instructions.spec.classes)

    def course(self, home: Path | None) -> Scenario:
        """What befalls the clients; it is recorded in that folder, if any."""
        return Scenario(
            self.config,
            clients=len(self.clients),
            labels=self.dataset.y,
            trigger=brightest(self.dataset.x),
            folder=home,
        )

    def without(self, clients: Sequence[int]) -> World:
        """The same world without some natural clients, tested on all data of these, held out or not."""
        assert self.dataset.client is not None  # noqa: S101 - `prepare` has refused other partitions
        members = np.flatnonzero(np.isin(self.dataset.client, clients))
        test, owners = self.dataset.examples.take(members), self.dataset.client[members]
        rest = [i for i in range(len(self.clients)) if i not in set(clients)]
        return replace(
            self,
            server=replace(self.server, test=test, test_owners=owners),
            clients=Population.dealt([self.clients[i] for i in rest]),
            names=tuple(self.names[i] for i in rest),
        )


def _repeatable_secret(instructions: Instructions, node_id: int) -> bytes:
    """A simulated client's key, which the seed decides: it can be repeated, and protects nobody."""
    return derived_key(instructions.seed, instructions.round, node_id)


def prepare(config: Config) -> World:
    """Read the data, deal it out, and check all that a first round would trip over.

    Raises:
        ConfigError: a key or value that cannot work with this task and data.
        DataError: the data cannot be used.
    """
    task = resolve(config.task)
    _check_folds(config)
    dataset = task.read(source_of(config))
    parts = split_of(config, dataset)
    clients = people(dataset, parts.train, config.clients, config.seed)
    _check_folds_of(config, dataset, len(clients))
    cohort = cohort_size(len(clients), config.rounds)
    if config.rounds.min_updates > cohort:
        raise ConfigError(
            f"rounds.min_updates = {config.rounds.min_updates}: a round asks only "
            f"{cohort} of {len(clients)} clients"
        )
    check(config, len(clients), dataset.spec)
    natural = config.clients.partition == "natural"
    names = dataset.clients if natural else Lazy(len(clients), str)
    world = World(config, task, dataset, server_part(dataset, parts), clients, names)
    _check_learnable(world)
    if config.tiers:
        check_source(config, world.server.proxy)
        check_possible(task, dataset.spec, config, world.server.proxy.x, gate=world.server.gate)
    return world


def _check_folds(config: Config) -> None:
    settings = config.evaluate
    if settings.folds is None and not settings.leave_one_client_out:
        return
    if settings.leave_one_client_out and settings.folds is not None:
        raise ConfigError(
            "evaluate.folds: with evaluate.leave_one_client_out each client is a fold; leave one out"
        )
    key = "evaluate.folds" if settings.folds else "evaluate.leave_one_client_out"
    if settings.leave_one_client_out and config.clients.partition != "natural":
        raise ConfigError("evaluate.leave_one_client_out: needs clients.partition = 'natural'")
    if config.rounds.target is not None or config.rounds.patience is not None:
        raise ConfigError(
            f"{key}: leave rounds.target and rounds.patience out; they would stop each training by its score "
            "on the very data that is left out"
        )


def _check_folds_of(config: Config, dataset: Dataset, clients: int) -> None:
    settings, natural = config.evaluate, config.clients.partition == "natural"
    if settings.leave_one_client_out and clients < 2:
        raise ConfigError("evaluate.leave_one_client_out: the data has one client; nobody is left to train")
    if settings.folds is None:
        return
    if natural and settings.folds > clients:
        raise ConfigError(
            f"evaluate.folds = {settings.folds}: there are {clients} clients to leave out; lower it"
        )
    if not natural and dataset.overlap:
        raise ConfigError(
            "evaluate.folds: this task's examples overlap, so a fold would share values with the others; set "
            "clients.partition = 'natural' to leave whole clients out"
        )


def _check_learnable(world: World) -> None:
    """Build the model and the strategy and push one example through, before anything is written."""
    config, spec = world.config, world.dataset.spec
    name = config.model.name or world.task.default_model
    moments = Moments.of(spec.zeros(2), spec) if config.model.standardise and spec.numeric else None
    preprocess = world.task.preprocess(spec, moments, config.model.filter)
    network = world.task.model(config.model.name)(spec)
    check_model(config, network)
    check_target(config.rounds, config.evaluate.metrics, spec.classes)
    strategies.build(
        config, network=network, population=len(world.clients), task=world.task, data=world.server
    )
    if config.privacy.mechanism != "none":
        clients = len(world.clients)
        check_population(config, expected_clients(config, clients), clients)
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
