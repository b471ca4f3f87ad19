"""The apps as they are deployed: every node reads its own file, the server its own, nobody is told a path."""

from __future__ import annotations

import json

import numpy as np
import pytest
from flwr.app import Context, RecordDict

from fedge.config import Config
from fedge_client.app import app as client_app
from fedge_server.app import HOME, app, config_of, run_config
from fedge_server.registry.database import Registry
from fedge_simulations.grid import RUN_ID, SERVER_NODE, VectorGrid


@pytest.fixture
def blobs(tmp_path):
    """Write examples of some classes of three well-separated ones; returns the path."""

    def write(name: str, classes: list[str], n: int = 60):
        rng = np.random.default_rng(len(name))
        y = np.array(classes)[rng.integers(0, len(classes), n)]
        centres = {"a": [5, 0], "b": [0, 5], "c": [-5, -5]}
        x = np.array([centres[label] for label in y]) + rng.normal(size=(n, 2))
        np.savez(tmp_path / f"{name}.npz", x=x.astype(np.float32), y=y)
        return str(tmp_path / f"{name}.npz")

    return write


def federate(config: Config, nodes, home) -> list:
    settings = run_config(config, home, "r")
    app(VectorGrid(client_app, nodes, settings), Context(RUN_ID, SERVER_NODE, {}, RecordDict(), settings))
    with Registry.open(home) as registry:
        return registry.records("r")[1:]


@pytest.mark.slow
def test_devices_that_hold_only_some_classes_learn_all(blobs, tmp_path):
    config = Config.from_mapping(
        {
            "task": "tables",
            "data": blobs("server", ["a", "b", "c"]),
            "rounds": {"count": 5},
            "train": {"epochs": 10},
        }
    )
    nodes = [
        {"task": "tables", "data": blobs("north", ["a", "c"])},
        {"task": "tables", "data": blobs("south", ["b", "c"])},
    ]
    records = federate(config, nodes, tmp_path / "home")
    assert records[-1].metrics["accuracy"] == 1.0
    assert records[-1].clients == 2


def test_a_device_that_does_not_offer_the_task_is_recorded_and_the_others_go_on(blobs, tmp_path):
    config = Config.from_mapping(
        {"task": "tables", "data": blobs("server", ["a", "b", "c"]), "rounds": {"count": 1}}
    )
    nodes = [
        {"task": "tables", "data": blobs("north", ["a", "b", "c"])},
        {"task": "images", "data": blobs("south", ["a", "b", "c"])},
        {"task": "tables", "data": str(tmp_path / "nowhere.npz")},
    ]
    (record,) = federate(config, nodes, tmp_path / "home")
    assert record.clients == 1
    reasons = {rejected.client: rejected.reason for rejected in record.rejected}
    assert "this device offers 'images'" in reasons[2]
    assert "does not exist" in reasons[3]


def test_a_device_with_a_label_that_the_run_does_not_know_is_rejected(blobs, tmp_path):
    config = Config.from_mapping(
        {"task": "tables", "data": blobs("server", ["a", "b"]), "rounds": {"count": 1}}
    )
    nodes = [
        {"task": "tables", "data": blobs("north", ["a", "b"])},
        {"task": "tables", "data": blobs("south", ["a", "c"])},
    ]
    (record,) = federate(config, nodes, tmp_path / "home")
    assert "label 'c' is not among the run's labels" in record.rejected[0].reason


def test_flowers_run_config_overrides_single_keys(tmp_path):
    settings = {**run_config(Config(), tmp_path, "r"), "rounds.count": 3, "strategy.name": "fedadam"}
    config = config_of(Context(RUN_ID, SERVER_NODE, {}, RecordDict(), settings))
    assert (config.rounds.count, config.strategy.name) == (3, "fedadam")
    assert json.loads(str(settings["fedge-config"]))["rounds"]["count"] == 20
    assert settings[HOME] == str(tmp_path)
