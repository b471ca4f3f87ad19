"""`fedge-client status`: what is installed here, and what this device's agent does."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedge.errors import FedgeError
from fedge_client.device import Device, Installed, exists


def run(arguments: argparse.Namespace) -> int:
    """Print both; exit code 1 when what is installed is damaged."""
    home: Path = arguments.home
    agent = agent_facts(home)
    # A device may only train: then nothing is installed, and that is no mistake.
    only_trains = agent is not None and not exists(home)
    shown, code = ({"home": str(home)}, 0) if only_trains else _installed(home)
    _print({**shown, "agent": agent}, arguments.format)
    return code


def _installed(home: Path) -> tuple[dict[str, Any], int]:
    device = Device.open(home)
    state = device.store.state()
    shown: dict[str, Any] = {"home": str(device.home), "tier": device.tier, "version": None}
    known = {"metadata": {role: asdict(found) for role, found in device.metadata().items()}}
    if state.current is None:
        return {**shown, "floor": state.lowest, **known}, 0
    back = device.previous(state)
    shown |= {
        "version": state.current.version,
        "previous": back.version if back else None,
        "floor": state.lowest,
        "left": state.left or None,
        "quarantine": list(state.quarantined),
    }
    try:
        installed, _ = device.running()
    except FedgeError as error:
        return {**shown, "damaged": str(error), **known}, error.exit_code
    if installed.damaged:
        return {**shown, "damaged": installed.damaged, "answers": installed.record.version, **known}, 1
    return {**shown, **_described(installed), **known}, 0


def _described(installed: Installed) -> dict[str, Any]:
    entry, release = installed.entry, installed.release
    return {
        "task": release.task,
        "created": release.created,
        "recipe": entry.recipe,
        "wire_bytes": entry.wire_bytes,
        "installed_bytes": entry.installed_bytes,
        "lineage": asdict(release.lineage),
    }


def agent_facts(home: Path) -> dict[str, Any] | None:
    """What is known of this device's agent; None where the device is not enrolled."""
    if not (home / "identity" / "hub.json").exists():  # asked before anything of grpc is loaded
        return None
    from fedge_client.agent import status
    from fedge_client.agent.identity import Identity
    from fedge_client.reports import Reports

    identity = Identity.open(home)
    facts: dict[str, Any] = {
        "device": identity.device_id,
        "tier": identity.hub.tier,
        "server": identity.hub.link_address,
        "certificate_days_left": round((identity.not_after - time.time()) / 86400, 1),
    }
    try:
        said = status.read(home)
    except FedgeError as error:
        return {**facts, "state": "unknown", "detail": str(error)}
    running = status.is_running(home)
    facts |= _state(said, running) | _work(said, running)
    return facts | {"reports_to_send": len(Reports(home).waiting()), "tasks": _tasks(home, said, running)}


def _state(said: Mapping[str, Any], running: bool) -> dict[str, Any]:
    contact = said.get("connected_since"), said.get("last_contact")
    last = max((moment for moment in contact if isinstance(moment, (int, float))), default=None)
    state, detail = str(said.get("state", "starting")), str(said.get("detail", ""))
    if not running:
        killed = said and state != "stopped"
        state, detail = "not running", "it ended without saying so" if killed else ""
    shown_last = "now" if running and state == "connected" else last and _moment(last)
    return {"state": state, "detail": detail or None, "last_contact": shown_last}


def _work(said: Mapping[str, Any], running: bool) -> dict[str, Any]:
    working = said.get("working") if running else None
    return {
        "training_process": said.get("child") if running else None,
        "messages": ", ".join(map(str, working)) if working else None,
        "answers_to_send": said.get("outbox", 0),
        "delivery": said.get("delivery") if running else None,
        "telemetry": said.get("telemetry") if running else None,
    }


def _tasks(home: Path, said: Mapping[str, Any], running: bool) -> dict[str, str]:
    """From each offered task's name to its digest, or to what is wrong with it."""
    if running and isinstance(said.get("tasks"), dict):
        return dict(said["tasks"])
    from fedge_client.agent import settings
    from fedge_client.agent.offers import digests_of

    try:
        offered = settings.load(home / settings.FILE).tasks
        return digests_of(offered, home)
    except FedgeError as error:
        return {settings.FILE: str(error)}


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _print(shown: Mapping[str, Any], form: str) -> None:
    if form == "json":
        sys.stdout.write(json.dumps(shown) + "\n")
        return
    for name, value in _flat(shown):
        sys.stdout.write(f"{name:<21} {'none' if value is None else value}\n")


def _flat(shown: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in shown.items():
        full = f"{before} {name}".strip()
        if isinstance(value, dict) and value:
            yield from _flat(value, full)
        elif value not in ({}, []):
            yield full, ", ".join(map(str, value)) if isinstance(value, list) else value
