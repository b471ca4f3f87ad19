"""The same two apps for Flower's own simulation (Ray), whose nodes have no data of their own.

Each simulated SuperNode takes one part of one data set, dealt out as in `fedge-sim`, and the server keeps
what it keeps there. `simulations/superlink/` is the Flower app that names these two.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache

from flwr.app import Context

from fedge.config import Config
from fedge.dataset import Examples
from fedge.errors import ConfigError
from fedge.learning.messages import Instructions
from fedge.task import Task
from fedge_client import app as client_app
from fedge_server import app as server_app
from fedge_server.data import ServerData
from fedge_simulations.world import World, prepare


def server_data(config: Config, task: Task) -> ServerData:
    """The server's part of the data set, which does not depend on the number of clients."""
    return prepare(config).server


def share(context: Context, instructions: Instructions) -> tuple[Task, Examples]:
    """The task, and the part of the data set that belongs to the node's `partition-id`.

    Raises:
        ConfigError: the simulation has another number of SuperNodes than the configuration has clients.
    """
    nodes = int(context.node_config["num-partitions"])
    config = server_app.config_of(context)
    return _world(json.dumps(config.to_mapping()), nodes).share_of(context, instructions)


@lru_cache(maxsize=1)  # a worker process of Ray plays many nodes
def _world(settings: str, nodes: int) -> World:
    config = Config.from_mapping(json.loads(settings))
    clients = config.clients
    if clients.count is None and clients.partition != "natural":
        clients = replace(clients, count=nodes)
    world = prepare(replace(config, clients=clients, tiers={}))
    if len(world.clients) != nodes:
        raise ConfigError(
            f"the run has {len(world.clients)} clients (clients.count, or those of the data), but the "
            f"simulation {nodes} SuperNodes; start it with "
            f"--federation-config 'num-supernodes={len(world.clients)}'"
        )
    return world


server = server_app.build(server_data)
client = client_app.build(share)
