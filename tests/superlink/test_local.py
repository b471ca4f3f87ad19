"""Flower's own simulation, which needs Ray: by `flwr run`, and by `fedge-sim run` with one key."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from fedge.config import Config
from fedge.errors import ConfigError
from fedge_server.registry.database import Registry
from fedge_simulations import run

APP = Path(__file__).parents[2] / "simulations" / "superlink"

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason='Ray is not installed (pip install "fedge[ray]")'
)


def test_without_ray_the_line_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)  # how Python is told that a module cannot be imported
    config = Config.from_mapping({"simulation": {"engine": "ray"}})
    with pytest.raises(ConfigError, match=r"Ray is not installed; pip install \"fedge\[ray\]\""):
        run(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def history(folder: Path) -> list[dict[str, object]]:
    """What a run has written of its rounds, but for the time that they took."""
    of_the_world = ("seconds", "simulated_s")  # Ray has no simulated clock
    lines = (folder / "history.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in of_the_world} for line in lines]


def on_ray(side, folder: Path, text: str) -> list[dict[str, object]]:
    """The history of a run in a process of its own, which Ray's processes end with."""
    (folder / "run.toml").write_text(text)
    command = [side.BIN / "fedge-sim", "run", "run.toml", "--set", "simulation.engine=ray", "--out", "on-ray"]
    try:
        subprocess.run(command, cwd=folder, env=side.environment(folder), check=True, timeout=240)
    finally:
        side.end_processes_of(folder)
    assert (folder / "on-ray" / "report.html").exists()
    return history(folder / "on-ray")


@needs_ray
@pytest.mark.slow
@pytest.mark.parametrize("name", ["scaffold", pytest.param("fedper", marks=pytest.mark.soak)])
def test_with_one_key_the_same_run_goes_over_ray_bit_for_bit(name, side, tmp_path):
    settings = f"""
        model.name = "mlp"
        clients = {{ count = 3, partition = "dirichlet:0.5" }}
        rounds = {{ count = 3, cohort = 2 }}
        train.momentum = 0.0
        strategy.name = "{name}"
    """
    lines = on_ray(side, tmp_path, settings)
    assert [(line["clients"], line["rejected"]) for line in lines] == [(2, [])] * 3
    in_turn = Config.load(tmp_path / "run.toml", ["simulation.engine=sequential"])
    run(in_turn, tmp_path / "in-turn")
    assert lines == history(tmp_path / "in-turn")
    models = [(tmp_path / place / "model.safetensors").read_bytes() for place in ("on-ray", "in-turn")]
    assert models[0] == models[1]


@needs_ray
@pytest.mark.slow
def test_clients_work_on_without_waiting_on_ray(side, tmp_path):
    lines = on_ray(
        side,
        tmp_path,
        """
        model.name = "mlp"
        clients.count = 4
        rounds.count = 4
        strategy = { name = "fedbuff", buffer = 2 }
        """,
    )
    assert [(line["clients"], line["rejected"], line["counted"]) for line in lines] == [(2, [], True)] * 4
    assert any(line["staleness"] for line in lines)  # four at work, two make a step


@needs_ray
@pytest.mark.slow
def test_flwr_run_local_deals_the_digits_out_to_simulated_supernodes(side, tmp_path):
    config, home = tmp_path / "run.toml", tmp_path / "home"
    config.write_text('[clients]\npartition = "dirichlet:0.5"\n[rounds]\ncount = 1\n')
    environment = side.environment(tmp_path) | {
        "FEDGE_HOME": str(home),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(side.free_port()),
        "FLWR_LOCAL_CONTROL_API_PORT": str(side.free_port()),
    }

    def flwr(*words: str) -> dict[str, object]:
        command = [side.BIN / "flwr", *words, "--format", "json"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=60)
        return json.loads(done.stdout)

    def ended() -> bool:
        nonlocal status
        status = flwr("ls", "local", "--run-id", run)["runs"][0]["status"]
        return status.startswith("finished")

    try:
        settings = ("--run-config", f'fedge-config="{config}"', "--federation-config", "num-supernodes=3")
        run, status = str(flwr("run", str(APP), "local", *settings)["run-id"]), ""
        side.until("the run ends", ended, 120, every=3)
    finally:
        side.end_processes_of(tmp_path)  # the SuperLink that `flwr run` leaves behind, and Ray's processes
    assert status == "finished:completed"
    with Registry.open(home) as registry:
        (row,) = registry.runs()
        (_, record) = registry.records(row["id"])
    assert (row["status"], record.clients, record.rejected) == ("done", 3, ())
