"""A server's home seals what it publishes, and hands keys on a stick to the devices that are named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedge.config import Config
from fedge.delivery import target_path
from fedge.errors import UserError
from fedge.identity import node_id_of
from fedge.sealing import Place, key_id, sealed_bytes, unseal, unwrap
from fedge_client.agent.identity import Hub, Identity, commit, load_or_create_keys
from fedge_client.cli import main as client
from fedge_client.device import Device
from fedge_server.cli import main
from fedge_server.identity.authority import Authority
from fedge_server.registry.database import Registry
from fedge_server.release import ReleasePlace, publish_draft

DEVICE, ID = X25519PrivateKey.generate(), "ab" * 32


@pytest.fixture
def enrolled(registry: Registry) -> str:
    """A device of tier micro."""
    registry.devices.create_token(token_id="0" * 16, secret_sha256="", tier="micro", expires=2e9)
    registry.devices.enrol(
        device_id=ID, node_id=1, public_key="", sealing_key=DEVICE.public_key().public_bytes_raw().hex(),
        tier="micro", token_id="0" * 16, fedge_version="", wire_version=2, not_after=2e9,
    )  # fmt: skip
    return ID


def wire_of(registry: Registry, place: ReleasePlace, version: int) -> bytes:
    manifest = json.loads(place.repository.manifests("micro")[version])
    return registry.store.get(manifest["variants"][0]["wire_sha256"])


def published(place: ReleasePlace, version: int) -> bytes:
    """The model's target as it lies in the folder."""
    entry = place.repository.content("micro").releases[version].files["model"]
    folder, name = target_path("micro", version, "model").split("/")
    return (place.home / "repository" / "targets" / folder / f"{entry.sha256}.{name}").read_bytes()


def test_a_servers_home_seals_what_it_publishes(
    server: ReleasePlace, registry: Registry, drafted: Callable[..., str]
) -> None:
    server.make(["micro"])
    assert publish_draft(server, registry, drafted("micro")).release is not None
    wire = wire_of(registry, server, 1)
    ciphertext = published(server, 1)
    assert server.content_keys.opened(ciphertext, "micro", 1) == wire
    assert len(ciphertext) == sealed_bytes(len(wire)) == server.travels(len(wire))
    assert (server.home / "keys" / "content").stat().st_mode & 0o777 == 0o700


@pytest.mark.slow
def test_the_setting_turns_it_off_and_a_simulation_never_seals(
    server: ReleasePlace, registry: Registry, drafted: Callable[..., str], tmp_path: Path
) -> None:
    (server.home / "server.toml").write_text("[delivery]\nseal = false\n")
    place = ReleasePlace.of(server.home)
    place.make(["micro"])
    publish_draft(place, registry, drafted("micro"))
    assert published(place, 1) == wire_of(registry, place, 1)
    simulated = ReleasePlace.of(tmp_path / "simulation")
    for each in (place, simulated):
        assert not each.seals
        assert each.travels(1000) == 1000


def test_a_budget_of_bytes_leaves_room_for_what_sealing_adds(server: ReleasePlace, tmp_path: Path) -> None:
    tiers = Config.from_mapping({"tiers": {"micro": {"max_wire_bytes": 20_000}, "big": {}}}).tiers
    within = server.leaving_room(tiers)
    assert within["micro"].max_wire_bytes == 20_000 - 72
    assert server.travels(within["micro"].max_wire_bytes or 0) == 20_000
    assert within["big"] == tiers["big"]
    assert ReleasePlace.of(tmp_path / "simulation").leaving_room(tiers) == tiers


@pytest.mark.slow
def test_a_stick_holds_what_its_devices_open_and_no_others(
    server: ReleasePlace,
    registry: Registry,
    drafted: Callable[..., str],
    enrolled: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.make(["micro", "board"])
    publish_draft(server, registry, drafted("micro", "board"))
    stick = tmp_path / "stick"
    arguments = ["release", "export", str(stick), "--home", str(server.home), "--format", "json"]
    assert main([*arguments, "--device", enrolled[:8]]) == 0
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert (said["tiers"], said["devices"], said["keys"]) == (["micro"], [enrolled], 1)
    name = key_id(server.content_keys.key("micro", 1))
    wrapped = (stick / "keys" / "micro" / "1" / enrolled).read_bytes()
    key = unwrap(wrapped, DEVICE, tier="micro", version=1, device_id=enrolled, expected=name)
    (model,) = (stick / "targets" / "micro").glob("*.model")
    assert unseal(model.read_bytes(), key, Place("micro", 1)) == wire_of(registry, server, 1)
    assert not (stick / "targets" / "board").exists()


@pytest.mark.slow
def test_a_device_without_a_network_installs_from_a_stick_that_was_made_for_it(
    server: ReleasePlace,
    registry: Registry,
    drafted: Callable[..., str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.make(["micro"])
    publish_draft(server, registry, drafted("micro", answer=2))
    homes = [tmp_path / name for name in ("named", "other")]
    for home in homes:
        enrol_here(home, registry, tmp_path / "ca")
        Device.create(home, "micro", server.repository.root())
    named = Identity.open(homes[0]).device_id
    stick = str(tmp_path / "stick")
    assert main(["release", "export", stick, "--home", str(server.home), "--device", named]) == 0

    assert client(["install", stick, "--home", str(homes[0])]) == 0
    assert Device.open(homes[0]).running()[0].release.version == 1
    capsys.readouterr()
    assert client(["install", stick, "--home", str(homes[1])]) == 1
    said = capsys.readouterr().err
    assert f"release export FOLDER --device {Identity.open(homes[1]).device_id[:16]}" in said
    unknown = tmp_path / "unknown"
    Device.create(unknown, "micro", server.repository.root())
    assert client(["install", stick, "--home", str(unknown)]) == 2
    assert "is sealed for enrolled devices" in capsys.readouterr().err


def enrol_here(home: Path, registry: Registry, ca: Path) -> None:
    """What enrolment does on both sides, without a network."""
    authority = Authority.open(ca) if ca.exists() else Authority.create(ca)
    keys = load_or_create_keys(home / "identity")
    node, token = node_id_of(keys.device_id), keys.device_id[:16]
    certificate = authority.issue_device(keys.request(), 1.0)
    hub = Hub("localhost:1", "localhost:2", keys.device_id, "micro", node)
    commit(home / "identity", keys, hub, certificate, authority.bundle)
    registry.devices.create_token(token_id=token, secret_sha256="", tier="micro", expires=2e9)
    registry.devices.enrol(
        device_id=keys.device_id,
        node_id=node,
        public_key="",
        sealing_key=keys.sealing_public.hex(),
        tier="micro",
        token_id=token,
        fedge_version="",
        wire_version=2,
        not_after=2e9,
    )


@pytest.mark.slow
def test_a_stick_for_nobody_known_or_over_something_is_not_written(
    server: ReleasePlace, registry: Registry, drafted: Callable[..., str], enrolled: str, tmp_path: Path
) -> None:
    server.make(["micro"])
    publish_draft(server, registry, drafted("micro"))
    arguments = ["release", "export", str(tmp_path / "stick"), "--home", str(server.home), "--device"]
    assert main([*arguments, "77"]) == 2
    registry.devices.revoke(enrolled, "stolen")
    assert main([*arguments, enrolled]) == 1
    assert not (tmp_path / "stick").exists()


@pytest.mark.slow
def test_a_lost_content_key_is_said_so(
    server: ReleasePlace, registry: Registry, drafted: Callable[..., str], enrolled: str, tmp_path: Path
) -> None:
    server.make(["micro"])
    publish_draft(server, registry, drafted("micro"))
    (server.keys / "content" / "micro.1").chmod(0o644)
    with pytest.raises(UserError, match="chmod 600"):
        server.content_keys.key("micro", 1)
    (server.keys / "content" / "micro.1").unlink()
    arguments = [
        "release",
        "export",
        str(tmp_path / "stick"),
        "--home",
        str(server.home),
        "--device",
        enrolled,
    ]
    assert main(arguments) == 1
