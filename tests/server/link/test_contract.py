"""One contract for both Grids, and every strategy over the link with the same result as in a simulation."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedge.config import Config
from fedge.learning import local
from fedge.learning.messages import to_record
from fedge.learning.state import arrays_of, digest
from fedge.wire.v1 import admin_pb2 as admin
from fedge_client import app as client_app
from fedge_server import app as server_app
from fedge_server.link.grid import RUN_ID, SERVER_NODE, LinkGrid
from fedge_server.registry.database import Registry
from fedge_server.registry.ledger import Ledger
from fedge_server.rounds.loop import Learned
from fedge_server.strategies import NAMES, options_of
from fedge_simulations.grid import VectorGrid
from fedge_simulations.simulate import learn
from fedge_simulations.world import World, prepare

OPTIONS = {
    "fedprox": {"proximal_mu": 0.1},
    "fedavgm": {"server_momentum": 0.5},
    "fedsgd": {"momentum": 0.9},
    "multikrum": {"num_malicious_nodes": 1, "num_nodes_to_select": 2},
    "krum": {"num_malicious_nodes": 1, "mixing": 0.2},
    "fedtrimmedavg": {"mixing": 0.2},
    "bulyan": {"num_malicious_nodes": 0},
    "ditto": {"pull": 0.5},
    "fedper": {"layers": 2},
    "feddf": {"models": "logistic,mlp", "epochs": 2},
}
WAITING = [name for name in NAMES if name not in ("fedasync", "fedbuff")]  # these give what comes first
MODELS = {"fedper": "mlp", "fedbn": "mlp-bn"}  # what they need; else the smallest


def echo() -> ClientApp:
    client = ClientApp()

    @client.train()
    def train(message, context):
        if context.node_id == 3:
            raise ValueError("out of battery")
        value = message.content.array_records["arrays"]["w"].numpy() + context.node_id
        content = RecordDict(
            {"arrays": to_record({"w": value}), "m": MetricRecord({"node": context.node_id})}
        )
        return Message(content, reply_to=message)

    return client


@pytest.fixture(params=["sequential", "link"])
def any_grid(request, hub):
    if request.param == "sequential":
        yield VectorGrid(echo(), [{}, {}, {}], {})
        return
    hub.devices |= dict.fromkeys((1, 2, 3), echo())
    made = LinkGrid(hub.home, "run", admin.Selection(task="digits"))
    yield made
    made.close()


def messages(grid):
    content = RecordDict({"arrays": to_record({"w": np.zeros(2, np.float32)})})
    return [Message(content, node, "train", group_id="7") for node in grid.get_node_ids()]


def test_every_node_is_there_and_each_answers_once(any_grid):
    assert list(any_grid.get_node_ids()) == [1, 2, 3]
    replies = any_grid.send_and_receive(messages(any_grid))
    assert sorted(reply.metadata.src_node_id for reply in replies) == [1, 2, 3]


def test_replies_can_be_iterated_again_and_name_what_they_answer(any_grid):
    asked = messages(any_grid)
    replies = any_grid.send_and_receive(asked)
    first = [reply.metadata.reply_to_message_id for reply in replies]
    assert [reply.metadata.reply_to_message_id for reply in replies] == first
    assert sorted(first) == sorted(message.metadata.message_id for message in asked)
    assert {reply.metadata.group_id for reply in replies} == {"7"}


def test_values_come_back_and_a_client_that_raises_is_an_error_reply(any_grid):
    by_node = {r.metadata.src_node_id: r for r in any_grid.send_and_receive(messages(any_grid))}
    assert by_node[2].content.array_records["arrays"]["w"].numpy().tolist() == [2, 2]
    assert by_node[2].content.metric_records["m"]["node"] == 2
    assert by_node[3].error.reason.endswith("ValueError: out of battery")


def test_who_stops_iterating_can_begin_the_next_round_at_once(any_grid):
    for _ in any_grid.send_and_receive(messages(any_grid)):
        break
    assert len(list(any_grid.send_and_receive(messages(any_grid)))) == 3


def test_push_and_pull_give_every_reply_once(any_grid):
    ids = list(any_grid.push_messages(messages(any_grid)))
    pulled: list[Message] = []
    for _ in range(200):
        pulled += any_grid.pull_messages(ids)
        if len(pulled) == 3:
            break
    assert sorted(reply.metadata.src_node_id for reply in pulled) == [1, 2, 3]
    assert list(any_grid.pull_messages(ids)) == []


@contextmanager
def over_the_link(world: World, hub, home: Path | None = None) -> Iterator[Learned]:
    """What a world's run over the link learned, each client behind a device; its Grid is open meanwhile."""
    device = _one_at_a_time(client_app.build(world.share_of))
    hub.devices |= dict.fromkeys(range(1, len(world.clients) + 1), device)
    learned: list[Learned] = []
    app = server_app.build(lambda *_: world.server, done=learned.append)
    settings = server_app.run_config(world.config, home or hub.home.root, "run")
    with closing(LinkGrid(hub.home, "run", admin.Selection(task="digits"))) as grid:
        app(grid, Context(RUN_ID, SERVER_NODE, {}, RecordDict(), settings))
        yield learned[0]


def learn_over_the_link(world: World, hub, home: Path | None = None) -> Learned:
    with over_the_link(world, hub, home) as learned:
        return learned


def exact(name):
    return {"accumulate": "float64"} if "accumulate" in options_of(name) else {}


@pytest.mark.slow
@pytest.mark.parametrize(
    "communication",
    [
        {"codec": ["topk:0.05", "int8"]},
        {"codec": ["randomk:0.1", "sign"]},
        {"codec": ["int8"]},
        {"codec": ["int8"], "downlink": ["topk:0.1", "int8"]},
    ],
    ids=lambda each: "-".join(map("+".join, each.values())),
)
def test_a_codec_gives_the_same_over_the_link_and_is_counted_as_it_travels(
    communication, hub, tmp_path: Path
):
    config = Config.from_mapping(
        {
            "model": {"name": "logistic"},
            "clients": {"count": 5},
            "rounds": {"count": 3},
            "train": {"epochs": 1},
            "communication": communication,
            "strategy": {"name": "fedavg", **exact("fedavg")},
            "simulation": {"engine": "sequential"},
        }
    )
    world = prepare(config)
    simulated = learn(world, tmp_path / "simulated", "run", lambda _: None)
    linked = learn_over_the_link(world, hub)
    assert digest(arrays_of(linked.model.network)) == digest(arrays_of(simulated.model.network))
    assert [r.updates for r in linked.records] == [r.updates for r in simulated.records]
    assert [r.bytes_up for r in linked.records] == [r.bytes_up for r in simulated.records]
    if "downlink" in communication:
        assert linked.records[2].bytes_down < linked.records[0].bytes_down / 5


@pytest.mark.quick_where(name=("fedbuff",))
@pytest.mark.parametrize("name", ["fedasync", "fedbuff"])
def test_asynchronous_rounds_go_over_the_link_and_leave_no_used_file_behind(name, hub, tmp_path: Path):
    config = Config.from_mapping(
        {
            "model": {"name": "logistic"},
            "clients": {"count": 5},
            "rounds": {"count": 12, "deadline_s": 60.0},
            "train": {"epochs": 1},
            "strategy": {"name": name, **({"buffer": 2} if name == "fedbuff" else {})},
        }
    )
    world = prepare(config)
    with over_the_link(world, hub) as linked:
        records = linked.records
        assert [record.clients for record in records] == [2 if name == "fedbuff" else 1] * 12
        assert all(record.staleness is not None and not record.rejected for record in records)
        # Of those at work, whose answers may have come to the hub, of the last step, and of the moments.
        left = 5 + 5 + (2 if name == "fedbuff" else 1)
        assert len([path for path in hub.home.spool("run").glob("*") if path.is_file()]) <= left
        assert len([path for path in hub.home.objects("run").glob("*") if path.is_file()]) <= left
    assert not [path for path in hub.home.objects("run").glob("*") if path.is_file()]


@pytest.mark.slow
@pytest.mark.parametrize("name", WAITING)
def test_a_strategy_learns_the_same_over_the_link_as_in_a_simulation(name, hub, tmp_path: Path):
    config = Config.from_mapping(
        {
            "model": {"name": MODELS.get(name, "logistic")},
            "clients": {"count": 5},
            "rounds": {"count": 3, "fraction": 0.8},
            "evaluate": {"federated": True},
            "train": {"epochs": 1},
            # Devices answer in any order, and float64 sums of 4 go back to the same float32 in each.
            "strategy": {"name": name, **OPTIONS.get(name, {}), **exact(name)},
            "simulation": {"engine": "sequential"},  # the device's own code, so equal to the bit
        }
    )
    world = prepare(config)
    simulated = learn(world, tmp_path / "simulated", "run", lambda _: None)
    linked = learn_over_the_link(world, hub)
    assert digest(arrays_of(linked.model.network)) == digest(arrays_of(simulated.model.network))
    assert [record.updates for record in linked.records] == [record.updates for record in simulated.records]
    assert [record.client_metrics for record in linked.records] == [
        record.client_metrics for record in simulated.records
    ]
    assert [r.anomalies for r in linked.records] == [r.anomalies for r in simulated.records]
    with Registry.open(hub.home.root) as registry:
        assert registry.run("run")["status"] == "done"


@pytest.mark.slow
def test_frozen_parts_are_the_same_to_the_bit_over_the_link(hub, tmp_path: Path):
    config = Config.from_mapping(
        {
            "model": {"name": "mlp"},
            "clients": {"count": 3},
            "rounds": {"count": 2},
            "train": {"epochs": 1, "freeze": ["1.*", "3.*"]},
            "evaluate": {"federated": True, "client_holdout": 0.2},
            "strategy": {"name": "fedavg", "accumulate": "float64"},  # devices answer in any order
            "simulation": {"engine": "sequential"},
        }
    )
    world = prepare(config)
    simulated = learn(world, tmp_path / "simulated", "run", lambda _: None)
    linked = learn_over_the_link(world, hub)
    first = arrays_of(local.first(world.task, "mlp", world.dataset.spec, config.seed))
    last, same = arrays_of(linked.model.network), ["1.weight", "1.bias", "3.weight", "3.bias"]
    assert [name for name in first if first[name].tobytes() == last[name].tobytes()] == same
    assert digest(last) == digest(arrays_of(simulated.model.network))
    assert [record.client_metrics for record in linked.records] == [
        record.client_metrics for record in simulated.records
    ]


@pytest.mark.slow
@pytest.mark.parametrize("mechanism", ["central", "local", "example"])
def test_over_the_link_noise_is_secret_and_no_seed_brings_it_back(mechanism, hub, tmp_path: Path):
    config = Config.from_mapping(
        {
            "model": {"name": "logistic", "standardise": False},
            "clients": {"count": 5},
            "rounds": {"count": 2},
            "train": {"epochs": 1},
            "privacy": {"mechanism": mechanism, "accountant": "rdp"},
        }
    )
    world = prepare(config)
    models = []
    for home in (hub.home.root, tmp_path / "again"):  # the same seed, the same devices
        linked = learn_over_the_link(world, hub, home)
        assert [(r.clients, r.privacy["noise"]) for r in linked.records] == [(5, "secret")] * 2
        models.append(digest(arrays_of(linked.model.network)))
        with Registry.open(home) as registry:
            rows = Ledger(registry.engine, "default").entries()
        assert [row.round for row in rows] == [1, 2]
        assert len({row.noise for row in rows}) == 2
        assert all(row.noise.startswith("secret:") for row in rows)
    assert models[0] != models[1]


def _one_at_a_time(app: ClientApp):
    lock = threading.Lock()

    def device(message, context):
        with lock:  # a ClientApp keeps its model from one message to the next
            return app(message, context)

    return device
