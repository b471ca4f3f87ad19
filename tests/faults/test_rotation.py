"""The certificate authority is replaced under real agents: one stays connected, one is away meanwhile."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from federation import Agent, Federation, wait_for


def authorities(device: Agent) -> int:
    """How many the device trusts."""
    return (device.home / "identity" / "ca.pem").read_text("ascii").count("BEGIN CERTIFICATE")


def restart(federation: Federation, device: Agent) -> None:
    assert device.process is not None
    device.process.end()
    federation.start_agent(device)


@pytest.mark.slow
def test_an_authority_is_replaced_and_no_device_is_lost(tmp_path: Path) -> None:
    with Federation(tmp_path, agents=2) as federation:
        stays, away = federation.devices
        federation.start_agents()
        assert away.process is not None
        away.process.end()
        federation.server("ca", "rotate")
        wait_for(lambda: authorities(stays) == 2, "the connected device is told")
        refused = federation.server("ca", "finish", check=False)
        assert refused == ""  # the one that is away would be lost
        federation.start_agent(away)  # with a certificate, and a bundle, from before
        wait_for(lambda: authorities(away) == 2, "the other one learns of it when it is back")
        for device in federation.devices:
            restart(federation, device)  # renews at once, instead of within a minute
        status = json.loads(federation.server("ca", "status", "--format", "json"))
        assert (status["rotating"], status["lacking"]) == (True, [])
        federation.server("ca", "finish")
        wait_for(lambda: {authorities(d) for d in federation.devices} == {1}, "the old one is forgotten")
        for device in federation.devices:
            restart(federation, device)
        federation.enrol("new")
        federation.start_agent(federation.devices[-1])
        assert len(federation.online()) == 3
