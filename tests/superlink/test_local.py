"""`flwr run` on one machine: Flower's own simulation, which needs Ray."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path

import pytest

from fedge_server.registry.database import Registry

APP = Path(__file__).parents[2] / "simulations" / "superlink"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None, reason='Ray is not installed (pip install "fedge[ray]")'
    ),
]


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
