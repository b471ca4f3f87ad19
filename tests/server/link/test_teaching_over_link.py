"""Clients that teach, calibrate and count over the link: the same as in a simulation.

To the bit but for ties: of an even number of examples one mean in as many lies between two float32 numbers,
and there the order in which devices answer decides.
"""

from __future__ import annotations

import threading
from contextlib import closing, nullcontext

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord

from fedge.artefact import pack
from fedge.config import Config
from fedge.learning.state import arrays_of
from fedge.learning.terms import TEACHER
from fedge.learning.whole import WholeModel
from fedge.statistics import Moments
from fedge.wire.arrays import records_of
from fedge.wire.v1 import admin_pb2 as admin
from fedge_client import app as client_app
from fedge_client.teaching import KEPT
from fedge_server import app as server_app
from fedge_server.compression.clients import Clients, Fleet
from fedge_server.compression.export import export
from fedge_server.link.grid import LinkGrid
from fedge_simulations.world import prepare

CONFIG = Config.from_mapping(
    {
        "model": {"name": "mlp"},
        "clients": {"count": 5},
        "evaluate": {"client_holdout": 0.3, "proxy_fraction": 0.0},
        "compress": {"data": "clients", "clients": {"rounds": 2, "epochs": 1}},
        "simulation": {"engine": "sequential"},
    }
)


def told(world, over, folder):
    """All that clients are asked, and what comes of it."""
    moments = Moments.of(world.dataset.x, world.dataset.spec)
    torch.manual_seed(0)
    network = world.task.model("mlp")(world.dataset.spec).eval()
    model = WholeModel(world.task.preprocess(world.dataset.spec, moments, "none"), network)
    asked = Clients(CONFIG, world.task, world.server, Fleet(over, folder), model, moments)
    name = next(iter(world.task.students))
    student = world.task.students[name](world.dataset.spec)
    taught = asked.teach(student, CONFIG.compress.distil, model=f"student:{name}", seed=0)
    installed = asked.calibrate(export(WholeModel(model.preprocess, taught), world.dataset.spec))
    counts = asked.evidence(pack(installed), len(installed)).counts
    weights = np.concatenate([value.ravel() for value in arrays_of(taught).values()])
    return weights, counts


@pytest.mark.slow
def test_clients_over_the_link_say_what_simulated_ones_say_and_get_the_teacher_once(hub, tmp_path):
    world, sent, lock = prepare(CONFIG), [], threading.Lock()
    app = client_app.build(world.share_of)

    def device(message, context):
        with lock:  # a ClientApp keeps its model from one message to the next
            brought = TEACHER in records_of(message.content, ArrayRecord)
            sent.append((message.metadata.message_type, context.node_id, brought))
            if (message.metadata.message_type, context.node_id) == ("query.counts", 2) and not brought:
                context.state.pop(KEPT, None)  # one device has lost it
            return app(message, context)

    hub.devices |= dict.fromkeys(range(1, 6), device)
    grid = LinkGrid(hub.home, "run", admin.Selection(task="digits"))
    linked = told(world, lambda _: nullcontext(grid), tmp_path / "linked")
    grid.close()

    def over(home):
        return closing(world.grid(server_app.run_config(CONFIG, home, "s")))

    simulated = told(world, over, tmp_path / "simulated")
    np.testing.assert_allclose(linked[0], simulated[0], rtol=1e-5, atol=1e-7)
    assert linked[1].n.tolist() == simulated[1].n.tolist()
    assert abs(linked[1].both - simulated[1].both).sum() <= 1
    got_it = sorted(node for _, node, brought in sent if brought)
    assert got_it == [1, 2, 2, 3, 4, 5]
    kinds = [kind for kind, _, _ in sent]
    assert (kinds.count("train"), kinds.count("query.ranges"), kinds.count("query.counts")) == (10, 5, 6)
