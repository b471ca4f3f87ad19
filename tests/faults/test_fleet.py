"""What becomes of a release in a whole fleet does not depend on a server that is killed meanwhile."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fleet import TIER, Fleet, digits_model, judged

from fedge_client.device import Device

DEVICES, AGENTS = 22, 1
CRITERIA = {
    "install": {"tolerated": 0.02, "unacceptable": 0.5, "at_least": 3},
    "confidence": {"tolerated": 0.02, "unacceptable": 0.5, "at_least": 3, "max_drop": 0.1},
}
EVERYBODY = {"name": "all", "percent": 100, "hold_h": 0.0005, "min_installs": DEVICES}
AT_ONCE = {"stages": [{**EVERYBODY, "hold_h": 0}], "criteria": CRITERIA}


def in_stages(fleet: Fleet) -> dict[str, Any]:
    """A plan whose canaries are a third of the simulated devices."""
    canaries = [device.device_id for device in fleet.simulated[: DEVICES // 3]]
    first = {"name": "canary", "devices": canaries, "percent": 0, "hold_h": 0.0005, "min_installs": 5}
    return {"false_halts": 0.01, "stages": [first, EVERYBODY], "criteria": CRITERIA}


@pytest.fixture
def folder() -> Iterator[Path]:
    """With a short name, for unix sockets."""
    made = Path(tempfile.mkdtemp(prefix="ff"))
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.mark.slow
def test_a_degraded_release_is_halted_and_taken_back_and_a_good_one_reaches_all_though_the_server_is_killed(
    folder: Path,
) -> None:
    good, better = digits_model(note="good"), digits_model(note="better")
    degraded = digits_model(sureness=0.2, shift=1)
    assert judged(good)[0] > 0.9 > 0.5 > judged(degraded)[0]

    with Fleet(folder, DEVICES, AGENTS) as fleet:
        first = fleet.publish(good, "good")
        fleet.start_agents()
        fleet.roll_out(first, AT_ONCE)
        fleet.wait_running(first)

        second = fleet.publish(better, "better")
        rollout = fleet.roll_out(second, in_stages(fleet))
        for status, stage in (("running", 0), ("holding", 0), ("running", 1)):
            fleet.wait_rollout(rollout, status, "holding", "done", stage=stage)
            fleet.kill_hub()
        fleet.wait_rollout(rollout, "done")
        fleet.wait_running(second)

        third = fleet.publish(degraded, "degraded, and nobody noticed")
        fleet.stop_signer()  # so that the way back cannot be signed yet
        rollout = fleet.roll_out(third, in_stages(fleet))
        fleet.kill_hub()
        state = fleet.wait_rollout(rollout, "halted", "awaiting_signature")
        assert state.stage == 0
        assert "confidence" in state.reason
        fleet.kill_hub()
        assert fleet.running().get(third, 0) <= DEVICES / 2
        fleet.start_signer()
        fleet.wait_rollout(rollout, "rolling_back", "rolled_back")
        fleet.kill_hub()
        state = fleet.wait_rollout(rollout, "rolled_back")
        assert state.replacement is not None
        fleet.wait_running(state.replacement)

        for home in [device.home for device in fleet.simulated]:
            installed, data = Device.open(home).running()
            assert (data, installed.release.version) == (better, state.replacement)
            assert Device.open(home).store.state().lowest == state.replacement
        never = [device for device in fleet.simulated if third not in device.versions]
        assert len(never) >= DEVICES / 2
        assert not (fleet.federation.home / "keys" / f"tier-{TIER}.key").exists()
        ciphertexts = list((fleet.federation.home / "repository" / "targets" / TIER).glob("*.model"))
        assert all(path.read_bytes().startswith(b"fedgesl") for path in ciphertexts)
