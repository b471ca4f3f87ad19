"""Each thing that can stand between a device and its server is told apart, against real servers."""

from __future__ import annotations

import socket
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedge.files import write_atomically
from fedge_client.agent import identity as files
from fedge_client.agent.diagnosis import diagnose
from fedge_client.agent.enrolment import enrol
from fedge_client.agent.identity import Identity, load_or_create_keys
from fedge_server.identity.authority import Authority

DAY = 86400.0


@pytest.fixture
def device(server: Any, tmp_path: Path) -> Identity:
    return enrol(tmp_path / "device", server.join())


def with_certificate(device: Identity, certificate: bytes) -> Identity:
    """The device with another certificate, on disk too, unchecked."""
    write_atomically(device.folder / files.CERTIFICATE, certificate, mode=0o600)
    return Identity.open(device.folder.parent)


def test_nothing_is_wrong(device: Identity) -> None:
    found = diagnose(device, device.hub.link_address)
    assert (found.kind, found.renewable) == ("ok", False)
    assert "TLS works with this device's certificate" in found.detail


def test_nobody_listens(server: Any, device: Identity) -> None:
    server.stop()
    found = diagnose(device, device.hub.link_address)
    assert found.kind == "unreachable"
    assert "Connection refused" in found.detail


def test_the_name_does_not_resolve(device: Identity) -> None:
    found = diagnose(device, "no-such-host.invalid:9443")
    assert found.kind == "unreachable"
    assert "does not resolve" in found.detail


@pytest.mark.slow
def test_somebody_listens_and_says_nothing(device: Identity) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        found = diagnose(device, f"localhost:{silent.getsockname()[1]}", timeout_s=0.2)
    assert found.kind == "unreachable"
    assert "timed out" in found.detail


@pytest.mark.parametrize("days", [-8, 91])
def test_the_clock_is_wrong(device: Identity, days: int) -> None:
    found = diagnose(device, device.hub.link_address, time.time() + days * DAY)
    assert found.kind == "clock"
    assert "this device's clock says 20" in found.detail


@pytest.mark.parametrize("days", [-1, 1])
def test_a_day_is_no_wrong_clock(device: Identity, days: int) -> None:
    assert diagnose(device, device.hub.link_address, time.time() + days * DAY).kind == "ok"


def test_the_server_is_of_another_authority(device: Identity, make_server: Any) -> None:
    other = make_server("other")
    found = diagnose(device, f"localhost:{other.link_port}")
    assert found.kind == "server_untrusted"
    assert "another authority" in found.detail


def test_the_server_stands_for_another_name(server: Any, device: Identity) -> None:
    server.listen = "0.0.0.0"
    server.restart()
    found = diagnose(device, f"127.0.0.2:{server.link_port}")
    assert found.kind == "server_untrusted"
    assert "127.0.0.2: the server's certificate is for 127.0.0.1, ::1, localhost" in found.detail


def test_a_device_that_poses_as_the_server(server: Any, device: Identity) -> None:
    write_atomically(server.home / "tls" / "server.pem", device.key_pem + device.certificate)
    server.restart()
    assert diagnose(device, device.hub.link_address).kind == "server_untrusted"


def test_the_own_certificate_has_expired(server: Any, device: Identity) -> None:
    old = Authority.open(server.authority.folder, clock=lambda: time.time() - 30 * DAY)
    expired = with_certificate(device, old.issue_device(device.keys.request(), 168))
    found = diagnose(expired, device.hub.link_address)
    assert (found.kind, found.renewable) == ("own_certificate_expired", True)


def test_the_server_refuses_the_own_certificate(device: Identity, tmp_path: Path) -> None:
    other = Authority.create(tmp_path / "other")
    refused = with_certificate(device, other.issue_device(device.keys.request(), 168))
    found = diagnose(refused, device.hub.link_address)
    assert (found.kind, found.renewable) == ("own_certificate_refused", True)
    assert "the server refuses this device's certificate" in found.detail


def test_a_certificate_that_only_the_servers_clock_says_has_expired_is_refused(
    server: Any, device: Identity
) -> None:
    old = Authority.open(server.authority.folder, clock=lambda: time.time() - 8 * DAY)
    expired = with_certificate(device, old.issue_device(device.keys.request(), 168))
    found = diagnose(expired, device.hub.link_address, time.time() - 2 * DAY)
    assert found.kind == "own_certificate_refused"


def test_certificate_and_key_do_not_belong_together(server: Any, device: Identity, tmp_path: Path) -> None:
    other = load_or_create_keys(tmp_path / "keys")
    mixed = replace(device, certificate=server.authority.issue_device(other.request(), 168))
    assert diagnose(mixed, device.hub.link_address).kind == "own_key_mismatch"
