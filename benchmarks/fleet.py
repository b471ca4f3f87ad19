"""A fleet of 200 devices: a degraded release is halted and taken back, a good one reaches all, with kills.

Hub, signer and some agents are processes on loopback; the other devices are simulated in this process: each
with a home, keys and a certificate, each verifying, opening and trying what it installs with the
client's own code. They report how sure the installed model is of 200 digits. The server is killed by SIGKILL
in each stage, twice while the way back is ordered: before its signature can be had, and after. Seconds depend
on the machine, on the holds of the plan (2 s a stage) and on starting a hub after each kill.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import _faults  # noqa: F401 - makes the fleet importable
from _harness import Options, Row, machine, options, publish
from fleet import Fleet, digits_model, judged

from fedge_client.device import Device

DEVICES, QUICK_DEVICES = 196, 36
AGENTS, QUICK_AGENTS = 4, 1
CRITERIA = {
    "install": {"tolerated": 0.02, "unacceptable": 0.10, "at_least": 3},
    "health": {"tolerated": 0.02, "unacceptable": 0.10, "at_least": 3},
    "confidence": {"tolerated": 0.10, "unacceptable": 0.40, "at_least": 3, "max_drop": 0.1},
}
PATIENCE_S = 300.0


def plan(fleet: Fleet) -> dict[str, Any]:
    """A tenth of the devices as canaries, a third, all."""
    ids = [device.device_id for device in fleet.simulated]
    shares = {"canary": len(ids) // 10, "third": len(ids) // 3}
    stages: list[dict[str, Any]] = [
        {
            "name": name,
            "devices": ids[:count],
            "percent": 0,
            "hold_h": 2 / 3600,
            "min_installs": max(count * 3 // 4, 1),
        }
        for name, count in shares.items()
    ]
    stages.append({"name": "all", "percent": 100, "hold_h": 2 / 3600, "min_installs": len(ids)})
    return {"false_halts": 0.01, "stages": stages, "criteria": CRITERIA}


def at_once(fleet: Fleet) -> dict[str, Any]:
    """Everybody, without a hold."""
    stage = {"name": "all", "percent": 100, "hold_h": 0, "min_installs": len(fleet.simulated)}
    return {"stages": [stage], "criteria": CRITERIA}


class Story:
    """What happened when."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet, self.rows, self.kills = fleet, list[Row](), 0
        self._start = time.perf_counter()

    def __call__(self, what: str) -> None:
        """Note what has happened, and what the devices run now."""
        running = self.fleet.running()
        shown = ", ".join(f"{count} run {version}" for version, count in sorted(running.items()))
        seconds = time.perf_counter() - self._start
        self.rows.append({"s": round(seconds, 1), "what": what, "devices": shown})
        print(f"{seconds:6.1f} s  {what}: {shown}", flush=True)

    def kill(self, when: str) -> None:
        """Kill the server, and note it."""
        self.fleet.kill_hub()
        self.kills += 1
        self(f"killed {when}, up again")


def good(fleet: Fleet, story: Story) -> tuple[int, float]:
    """A good release through all stages, the server killed in each; its version, and the seconds."""
    version, start = fleet.publish(digits_model(note="better"), "better"), time.perf_counter()
    rollout = fleet.roll_out(version, plan(fleet))
    for stage in range(3):
        fleet.wait_rollout(rollout, "running", "holding", "done", stage=stage, timeout_s=PATIENCE_S)
        story.kill(f"in stage {stage + 1} of a good release")
    fleet.wait_rollout(rollout, "done", timeout_s=PATIENCE_S)
    fleet.wait_running(version, PATIENCE_S)
    story(f"release {version} is done")
    return version, time.perf_counter() - start


def degraded(fleet: Fleet, story: Story) -> dict[str, float]:
    """A degraded release: halted in the canary stage, and taken back once it can be signed."""
    version = fleet.publish(digits_model(sureness=0.2, shift=1), "degraded")
    fleet.stop_signer()
    start = time.perf_counter()
    rollout = fleet.roll_out(version, plan(fleet))
    story.kill("in the canary stage of a degraded release")
    state = fleet.wait_rollout(rollout, "halted", "awaiting_signature", timeout_s=PATIENCE_S)
    halted = time.perf_counter() - start
    story(f"halted in stage {state.stage + 1} ({state.reason}); no signer is there")
    story.kill("while the way back awaits its signature")
    fleet.start_signer()
    signed = time.perf_counter()
    fleet.wait_rollout(rollout, "rolling_back", "rolled_back", timeout_s=PATIENCE_S)
    story.kill("while devices go back")
    state = fleet.wait_rollout(rollout, "rolled_back", timeout_s=PATIENCE_S)
    fleet.wait_running(state.replacement or 0, PATIENCE_S)
    story(f"all run release {state.replacement}, which holds the content of {state.base}")
    reached = sum(version in device.versions for device in fleet.simulated)
    floors = [Device.open(device.home).store.state().lowest for device in fleet.simulated]
    return {
        "degraded_halted_in_stage": state.stage + 1.0,
        "degraded_devices_reached": float(reached),
        "degraded_halted_s": halted,
        "taken_back_s": time.perf_counter() - signed,
        "devices_at_the_new_floor": float(sum(floor == state.replacement for floor in floors)),
    }


def measure(asked: Options, folder: Path) -> tuple[list[Row], dict[str, float]]:
    """The whole story."""
    devices = QUICK_DEVICES if asked.quick else DEVICES
    agents = QUICK_AGENTS if asked.quick else AGENTS
    with Fleet(folder, devices, agents) as fleet:
        story = Story(fleet)
        story(f"{devices} simulated devices and {agents} agents are enrolled")
        first, start = fleet.publish(digits_model(note="good"), "good"), time.perf_counter()
        fleet.start_agents()
        fleet.roll_out(first, at_once(fleet))
        fleet.wait_running(first, PATIENCE_S)
        story(f"release {first} is on all")
        claims = {"devices": float(devices + agents), "first_on_all_s": time.perf_counter() - start}
        version, seconds = good(fleet, story)
        claims |= {"good_on_all_s": seconds, "good_devices": float(fleet.running().get(version, 0))}
        claims |= degraded(fleet, story) | {"kills": float(story.kills)}
        failures = sorted({line for device in fleet.simulated for line in device.errors})
        print(json.dumps(failures[:5]) if failures else "no device failed an installation")
    return story.rows, claims


def main() -> None:
    """Measure and publish."""
    asked = options(__doc__ or "")
    before = machine()
    accuracies = [judged(model)[0] for model in (digits_model(), digits_model(sureness=0.2, shift=1))]
    folder = Path(tempfile.mkdtemp(prefix="ff"))  # a short name, for unix sockets
    try:
        rows, claims = measure(asked, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    claims |= {"accuracy_good": accuracies[0], "accuracy_degraded": accuracies[1]}
    publish(asked, before, claims, rows)


if __name__ == "__main__":
    main()
