"""`simulation.engine = "ray"`: the same two apps in Flower's simulation, for more than one machine.

Flower gives its simulated SuperNodes other ids in each run. So clients are numbered as in every other
simulation, the number travels in the message, and whichever node gets it plays that client: choice of
clients, seeds and results are those of `engine = "sequential"`, bit for bit, and a run can be resumed.

Each actor of Ray reads the data set once and deals it out by the seed, so no data travels. Where a cluster
is running, RAY_ADDRESS names it; its machines need fedge and the data under the same paths.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run

from fedge.config import Config
from fedge.errors import ConfigError, FedgeError
from fedge_client import app as client_app
from fedge_server.rounds.grids import OwnGrid
from fedge_simulations.grid import RUN_ID, SERVER_NODE, UserConfig
from fedge_simulations.scenario import plain
from fedge_simulations.world import World, prepare

NUMBER = "fedge-client"  # a record of each message: which client is asked
QUIET = (  # read when flwr and Ray start: nothing is reported to anybody, and no tip is printed
    "FLWR_TELEMETRY_ENABLED",
    "RAY_USAGE_STATS_ENABLED",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO",
)
POLL_S = 0.05  # Flower's grid in memory can only be asked


def check(config: Config) -> None:
    """Refuse what cannot run there, before anything is written.

    Raises:
        ConfigError: Ray is not installed, or the run has a part that only a simulation in one process has.
    """
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(
            "simulation.engine = 'ray': Ray is not installed; pip install \"fedge[ray]\", or leave it out"
        )
    if not plain(config.scenario):
        raise ConfigError(
            "scenario: simulation.engine = 'ray' has no simulated clock; leave all but its pace out"
        )
    if config.rounds.local_work == "adaptive":
        raise ConfigError(
            "rounds.local_work = 'adaptive': simulation.engine = 'ray' has no simulated clock to decide by; "
            "leave one of them out"
        )
    if config.evaluate.leave_one_client_out or config.evaluate.folds:
        raise ConfigError(
            "evaluate.folds, evaluate.leave_one_client_out: not with simulation.engine = 'ray'; leave one out"
        )


def run(server: ServerApp, world: World, settings: UserConfig) -> None:
    """Run a ServerApp over the world's clients, each played by whichever actor of Ray is free.

    Args:
        server: an app of `fedge_server.app.build`.
        world: its clients.
        settings: the ServerApp's run_config.

    Raises:
        FedgeError: the server's, or Ray itself failed.
    """
    check(world.config)
    for variable in QUIET:
        os.environ.setdefault(variable, "0")
    # Flower says that this function will go once `flwr run` does all that it does; it does not yet.
    logging.getLogger("flwr").setLevel(logging.ERROR)
    from flwr.simulation import run_simulation

    around, over = ServerApp(), threading.Event()

    @around.main()
    def main(grid: Grid, _: Context) -> None:
        numbered = NumberedGrid(grid, len(world.clients), world.clients.size, over)
        server(numbered, Context(RUN_ID, SERVER_NODE, {}, RecordDict(), settings))

    try:
        run_simulation(
            around, NumberedClients(world.config), len(world.clients), backend_config=_backend(world.config)
        )
    except RuntimeError as error:  # Flower's own wrapping of whatever Ray raised; it has logged the cause
        raise FedgeError(f"simulation.engine = 'ray': {error}") from error
    finally:
        over.set()  # the server waits in a thread of its own, also where Ray has failed


def _backend(config: Config) -> Any:
    """One CPU for each actor; clients train on it, so no share of a GPU is asked for.

    `simulation.workers` bounds the actors of a Ray that is started here; a cluster has its own bounds.
    """
    workers = config.simulation.workers
    init: dict[str, Any] = {"log_to_driver": False}
    if workers and "RAY_ADDRESS" not in os.environ:
        init["num_cpus"] = workers
    return {"init_args": init, "client_resources": {"num_cpus": 1, "num_gpus": 0.0}}


class NumberedClients(ClientApp):
    """The ClientApp of a simulation, playing the client whose number the message carries."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self._settings = json.dumps(config.to_mapping())  # small: Ray sends it with every message

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer as that client does in every other simulation."""
        record = message.content.pop(NUMBER)
        assert isinstance(record, ConfigRecord)  # noqa: S101 - narrows the type; NumberedGrid wrote it
        number = record["number"]
        assert isinstance(number, int)  # noqa: S101 - likewise
        app, clients = _once(self._settings)
        place: UserConfig = {"partition-id": number - 1, "num-partitions": clients}
        # Its state is kept by the node: the grid sends a client to the same node throughout a run.
        own = Context(RUN_ID, number, place, context.state, {})
        reply = app(message, own)
        context.state = own.state
        return reply


@lru_cache(maxsize=1)  # an actor of Ray plays many clients
def _once(settings: str) -> tuple[ClientApp, int]:
    world = prepare(Config.from_mapping(json.loads(settings)))
    return client_app.build(world.share_of), len(world.clients)


class NumberedGrid(OwnGrid):
    """Clients 1 to N over the SuperNodes of Flower's grid, and replies as they come."""

    def __init__(self, grid: Grid, clients: int, size: Callable[[int], int], over: threading.Event) -> None:
        """Wait until all are there.

        Args:
            grid: Flower's.
            clients: how many.
            size: examples of a client, which count from 0 here.
            over: set once the run has ended.
        """
        self._grid, self._size, self._over = grid, size, over
        while len(nodes := sorted(grid.get_node_ids())) < clients:  # Flower adds them beside this thread
            if over.wait(POLL_S):
                raise FedgeError("simulation.engine = 'ray': it ended before all clients were there")
        self._nodes = tuple(nodes)
        self._numbers = {node: number for number, node in enumerate(self._nodes, start=1)}

    def set_run(self, run: Run) -> None:
        """Nothing to do: there is one run."""

    @property
    def run(self) -> Run:
        """The run that Flower made up."""
        return self._grid.run

    def get_node_ids(self) -> Iterable[int]:
        """The clients' numbers; all are online."""
        return range(1, len(self._nodes) + 1)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send each to the node that plays the client, with the client's number in it."""
        return self._grid.push_messages([self._addressed(message) for message in messages])

    def _addressed(self, message: Message) -> Message:
        metadata, number = message.metadata, message.metadata.dst_node_id
        content = RecordDict(dict(message.content))  # the records are shared by all clients of a round
        content[NUMBER] = ConfigRecord({"number": number})
        return Message(
            content,
            self._nodes[number - 1],
            metadata.message_type,
            ttl=metadata.ttl,
            group_id=metadata.group_id,
        )

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies that have come, from the clients' numbers."""
        replies = list(self._grid.pull_messages(message_ids))
        for reply in replies:
            number = self._numbers[reply.metadata.src_node_id]
            reply.metadata.__dict__["_src_node_id"] = number
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send, and iterate over replies until all have come, or `timeout` seconds have passed.

        They are handed out in the order in which they would arrive in `engine = "sequential"`, where each
        client takes its time by its examples: sums depend on their order. They can be iterated again.
        """
        sent = list(messages)
        ids = list(self.push_messages(sent))
        sizes = [self._size(message.metadata.dst_node_id - 1) for message in sent]
        order = [ids[i] for i in sorted(range(len(ids)), key=sizes.__getitem__)]
        return _Replies(self, order, timeout, self._over)


class _Replies:
    """Replies of one round in their order: waited for when first reached, remembered for a second pass."""

    def __init__(
        self, grid: NumberedGrid, waiting: list[str], timeout: float | None, over: threading.Event
    ) -> None:
        self._grid, self._waiting, self._over = grid, waiting, over
        self._until = None if timeout is None else time.monotonic() + timeout
        self._seen: list[Message] = []

    def __iter__(self) -> Iterator[Message]:
        yield from self._seen
        while self._waiting:
            first = self._waiting.pop(0)
            while not (came := list(self._grid.pull_messages([first]))) and not self._late:
                if self._over.wait(POLL_S):
                    raise FedgeError("simulation.engine = 'ray': it ended before all clients had answered")
            for reply in came:
                self._seen.append(reply)
                yield reply

    @property
    def _late(self) -> bool:
        return self._until is not None and time.monotonic() >= self._until
