"""Device and server together: real gRPC, real certificates, real files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedge.identity import JoinString
from fedge_client.agent.enrolment import enrol, renew
from fedge_client.agent.identity import Identity

DAY = 86400.0


def test_a_join_string_makes_a_device(server: Any, tmp_path: Path) -> None:
    join = JoinString.parse(str(server.join("board")))
    made = enrol(tmp_path / "device", join)
    row = server.registry.devices.get(made.device_id)
    assert (made.hub.tier, row.tier, row.status) == ("board", "board", "active")
    assert (made.hub.node_id, row.sealing_key) == (row.node_id, made.keys.sealing_public.hex())
    assert made.hub.link_address == f"localhost:{server.link_port}"
    assert made.bundle == server.authority.bundle
    assert Identity.open(tmp_path / "device").certificate == made.certificate


def test_a_renewal_gives_the_same_device_a_later_certificate(server: Any, tmp_path: Path) -> None:
    made = enrol(tmp_path / "device", server.join())
    server.shift = 3 * DAY
    later = renew(made, now=server.clock())
    assert later.device_id == made.device_id
    assert later.not_after - made.not_after == pytest.approx(3 * DAY, abs=10)
    assert Identity.open(tmp_path / "device").certificate == later.certificate
