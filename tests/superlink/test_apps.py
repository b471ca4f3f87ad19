"""What the two Flower apps consist of, and the simulation's pair of apps without Ray."""

from __future__ import annotations

import json
import subprocess
import tomllib
import zipfile
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict

from fedge.config import Config
from fedge_server.app import CONFIG, HOME, RUN, config_of
from fedge_server.registry.database import Registry
from fedge_simulations import flower
from fedge_simulations.grid import RUN_ID, SERVER_NODE, VectorGrid

ROOT = Path(__file__).parents[2]
APPS = [ROOT / "server" / "superlink", ROOT / "simulations" / "superlink"]


@pytest.mark.slow
@pytest.mark.parametrize("app", APPS, ids=lambda path: path.parent.name)
def test_the_bundle_holds_the_manifest_alone_and_installs_nothing(app, side, tmp_path):
    build = [side.BIN / "flwr", "build", "--app", app]
    subprocess.run(build, cwd=tmp_path, env=side.environment(tmp_path), check=True, capture_output=True)
    (file,) = tmp_path.glob("*.fab")
    with zipfile.ZipFile(file) as bundle:
        assert set(bundle.namelist()) == {"pyproject.toml", ".info/CONTENT"}
    assert tomllib.loads((app / "pyproject.toml").read_text("utf-8"))["project"]["dependencies"] == []


@pytest.mark.parametrize("app", APPS, ids=lambda path: path.parent.name)
def test_the_manifest_declares_the_keys_of_the_serverapp_and_its_defaults_are_the_servers(app):
    declared = tomllib.loads((app / "pyproject.toml").read_text("utf-8"))["tool"]["flwr"]["app"]["config"]
    assert set(declared) == {CONFIG, HOME, RUN}
    assert config_of(Context(RUN_ID, SERVER_NODE, {}, RecordDict(), declared)) == Config()


def test_the_configuration_may_be_a_file_whose_data_lies_beside_it(tmp_path):
    (tmp_path / "run.toml").write_text('data = "own.npz"\n[rounds]\ncount = 4\n')
    settings = {CONFIG: str(tmp_path / "run.toml"), HOME: "", RUN: "", "rounds.patience": 2}
    config = config_of(Context(RUN_ID, SERVER_NODE, {}, RecordDict(), settings))
    assert (config.data, config.rounds.count, config.rounds.patience) == (str(tmp_path / "own.npz"), 4, 2)


def simulate(home: Path, nodes: int, config: dict[str, object]) -> list:
    """Run the simulation's apps over so many nodes; the records of the rounds."""
    settings = {CONFIG: json.dumps(config), HOME: str(home), RUN: "r"}
    parts = [{"partition-id": i, "num-partitions": nodes} for i in range(nodes)]
    grid = VectorGrid(flower.client, parts, settings)
    flower.server(grid, Context(RUN_ID, SERVER_NODE, {}, RecordDict(), settings))
    with Registry.open(home) as registry:
        return registry.records("r")[1:]


def test_simulated_nodes_share_one_data_set_and_the_server_keeps_its_own_part(tmp_path):
    (record,) = simulate(tmp_path, 3, {"model": {"name": "logistic"}, "rounds": {"count": 1}})
    assert (record.clients, record.rejected) == (3, ())
    digits, held_out, proxy = 1797, 0.2, 0.1
    trained = sum(
        len(part) for part in flower._world.__wrapped__(json.dumps(Config().to_mapping()), 3).clients
    )
    assert trained == pytest.approx(digits * (1 - held_out) * (1 - proxy), rel=0.01)


def test_another_number_of_nodes_than_clients_is_said_with_the_option_to_give(tmp_path):
    config = {"model": {"standardise": False}, "clients": {"count": 4}, "rounds": {"count": 1}}
    with pytest.raises(Exception, match="no round counted") as raised:
        simulate(tmp_path, 3, config)
    assert "num-supernodes=4" in str(raised.value)
