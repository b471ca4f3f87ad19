"""Admission as the hub remembers it: what was read later counts, and a revocation always."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from fedge.errors import RevokedError
from fedge_server.hub.gate import Gate
from fedge_server.identity.admission import Peer


def test_a_read_that_ends_late_does_not_bring_a_revoked_device_back(tools: Any, tmp_path: Path) -> None:
    rig = tools.rig(tmp_path / "home")
    devices, first, second = rig.registry.devices, rig.device(), rig.device()
    gate = Gate(rig.authority, devices)
    peer, later = Peer(first.id, 0.0, 2**40), Peer(second.id, 0.0, 2**40)
    has_read, go_on = threading.Event(), threading.Event()
    real = devices.all

    def slow() -> Any:
        rows = [row for row in real() if row.id == first.id]  # the second enrols only afterwards
        has_read.set()
        assert go_on.wait(10)
        return rows

    async def scenario() -> None:
        devices.all = slow
        old = asyncio.create_task(gate.refresh())
        assert await asyncio.to_thread(has_read.wait, 10)
        devices.revoke(first.id, "stolen")
        devices.all = real
        await gate.refresh()
        go_on.set()
        await old
        with pytest.raises(RevokedError, match="stolen"):
            gate.still(peer)
        gate.still(later)

    try:
        asyncio.run(scenario())
    finally:
        rig.registry.close()
