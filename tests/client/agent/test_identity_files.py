"""The files of a device's identity: what is refused, and what a kill leaves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedge.errors import FedgeError, FormatError, IdentityError, UserError
from fedge.identity import bundle_digest, node_id_of
from fedge_client.agent import identity as module
from fedge_client.agent.identity import Hub, Identity, commit, is_enrolled, load_or_create_keys, locked
from fedge_server.identity.authority import Authority

NOW = 1_800_000_000.0
DAY = 86400.0


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.create(tmp_path / "ca", clock=lambda: NOW)


def hub_of(device_id: str, /, **changes: Any) -> Hub:
    values = {
        "link_address": "fedge.example.org:9443",
        "enrolment_address": "[::1]:9444",
        "device_id": device_id,
        "tier": "micro",
        "node_id": node_id_of(device_id),
    }
    return Hub(**{**values, **changes})


@pytest.fixture
def device(authority: Authority, tmp_path: Path) -> Identity:
    folder = tmp_path / "home" / "identity"
    keys = load_or_create_keys(folder)
    certificate = authority.issue_device(keys.request(), 168)
    return commit(folder, keys, hub_of(keys.device_id), certificate, authority.bundle)


def test_an_identity_is_found_again(device: Identity, authority: Authority, tmp_path: Path) -> None:
    found = Identity.open(tmp_path / "home")
    assert (found.hub, found.certificate, found.bundle) == (device.hub, device.certificate, device.bundle)
    assert found.keys.sealing_public == device.keys.sealing_public
    assert found.bundle_sha256.hex() == bundle_digest(authority.bundle) == authority.bundle_digest
    assert (found.not_before, found.not_after) == (NOW - DAY, NOW + 7 * DAY)


def test_keys_are_made_once(tmp_path: Path) -> None:
    first, again = load_or_create_keys(tmp_path), load_or_create_keys(tmp_path)
    assert first.device_id == again.device_id
    assert first.sealing_public == again.sealing_public


def test_a_home_without_hub_json_is_not_enrolled(device: Identity, tmp_path: Path) -> None:
    (device.folder / module.HUB).unlink()
    assert not is_enrolled(tmp_path / "home")
    with pytest.raises(UserError, match="not enrolled; run: fedge-client enroll JOIN"):
        Identity.open(tmp_path / "home")


@pytest.mark.parametrize("name", [module.DEVICE_KEY, module.SEALING_KEY])
def test_keys_that_others_may_read_are_refused(device: Identity, tmp_path: Path, name: str) -> None:
    (device.folder / name).chmod(0o644)
    with pytest.raises(UserError, match="chmod 600"):
        Identity.open(tmp_path / "home")


@pytest.mark.parametrize(
    "name", [module.DEVICE_KEY, module.SEALING_KEY, module.HUB, module.CERTIFICATE, module.BUNDLE]
)
@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff" * 100, b"x" * 200_000])
def test_a_damaged_file_is_refused_with_our_error(
    device: Identity, tmp_path: Path, name: str, content: bytes | None
) -> None:
    if content is None and name == module.HUB:
        pytest.skip("then it is not enrolled")
    if content is None:
        (device.folder / name).unlink()
    else:
        (device.folder / name).write_bytes(content)
    with pytest.raises(FormatError):
        Identity.open(tmp_path / "home")


def test_another_key_than_was_enrolled_is_refused(device: Identity, tmp_path: Path) -> None:
    load_or_create_keys(tmp_path / "other")
    (tmp_path / "other" / module.DEVICE_KEY).replace(device.folder / module.DEVICE_KEY)
    with pytest.raises(FormatError, match="is not the key that was enrolled"):
        Identity.open(tmp_path / "home")


@pytest.mark.parametrize(
    "change",
    [
        {"link_address": "nowhere"},
        {"enrolment_address": "a:0"},
        {"tier": "../x"},
        {"device_id": "abc"},
        {"node_id": 5},
    ],
)
def test_what_a_server_may_not_say_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(FormatError):
        hub_of("ab" * 32, **change)


@pytest.mark.parametrize(
    "value",
    ["[]", "5", '"x"', "[" * 10_000, json.dumps({"schema": 1}), json.dumps({"schema": 2})],
    ids=range(6),
)
def test_a_hub_json_that_fedge_never_writes_is_refused(value: str) -> None:
    with pytest.raises(FormatError, match=r"hub\.json: damaged"):
        Hub.from_bytes(value.encode())


def test_a_certificate_for_another_key_or_of_another_authority_is_not_kept(
    device: Identity, authority: Authority, tmp_path: Path
) -> None:
    stranger = load_or_create_keys(tmp_path / "stranger")
    other = Authority.create(tmp_path / "other-ca", clock=lambda: NOW)
    with pytest.raises(IdentityError, match="one for another key"):
        device.with_reply(device.hub, authority.issue_device(stranger.request(), 1), authority.bundle)
    with pytest.raises(IdentityError, match="signed by none of the CAs"):
        device.with_reply(device.hub, other.issue_device(device.keys.request(), 1), authority.bundle)
    with pytest.raises(IdentityError, match="one for another key"):
        device.with_reply(hub_of("ab" * 32), device.certificate, authority.bundle)
    assert Identity.open(tmp_path / "home").certificate == device.certificate


def test_a_new_bundle_is_kept_and_asks_for_a_renewal(device: Identity, authority: Authority) -> None:
    assert device.with_bundle(authority.bundle) is device
    assert not device.needs_renewal(NOW)
    authority.rotate()
    told = device.with_bundle(authority.bundle)
    assert told.needs_renewal(NOW)
    assert not told.with_reply(
        told.hub, authority.issue_device(told.keys.request(), 168), authority.bundle
    ).needs_renewal(NOW)


@pytest.mark.parametrize("bundle", [b"", b"x", b"x" * 100_000])
def test_a_bundle_that_is_none_is_not_kept(device: Identity, tmp_path: Path, bundle: bytes) -> None:
    with pytest.raises(FormatError):
        device.with_bundle(bundle)
    assert Identity.open(tmp_path / "home").bundle == device.bundle


def test_a_short_certificate_is_renewed_when_a_third_is_left(device: Identity, authority: Authority) -> None:
    short = device.with_reply(device.hub, authority.issue_device(device.keys.request(), 3), device.bundle)
    assert not short.needs_renewal(NOW + 1.9 * 3600)
    assert short.needs_renewal(NOW + 2.1 * 3600)
    assert short.expired(NOW + 3.1 * 3600)


@pytest.mark.parametrize("step", range(3))
def test_a_renewal_that_is_killed_leaves_an_identity_that_works(
    device: Identity, authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    write, done = module.write_atomically, 0

    def killed(path: Path, data: bytes, *, mode: int) -> None:
        nonlocal done
        if done == step:
            raise KeyboardInterrupt
        done += 1
        write(path, data, mode=mode)

    authority.rotate()
    certificate = authority.issue_device(device.keys.request(), 200)
    monkeypatch.setattr(module, "write_atomically", killed)
    with pytest.raises(KeyboardInterrupt):
        device.with_reply(device.hub, certificate, authority.bundle)
    found = Identity.open(tmp_path / "home")
    assert found.certificate in (device.certificate, certificate)
    assert device.bundle in found.bundle  # a bundle that trusts the server, whichever


def test_only_one_process_enrols_at_a_time(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(FedgeError, match="another process"), locked(tmp_path):
        pass


def test_a_folder_that_cannot_be_made_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FedgeError, match="cannot be written"), locked(tmp_path / "file" / "identity"):
        pass


def test_private_keys_are_not_shown(device: Identity) -> None:
    assert "PRIVATE" not in repr(device)
    assert repr(replace(device.keys)) == "Keys()"


def test_whoever_asks_the_cloud_shows_the_certificate_that_the_agent_has_renewed(
    device: Identity, authority: Authority, tmp_path: Path
) -> None:
    from fedge_client.joint import CloudError
    from fedge_client.joint.asking import Renewed

    shown = Renewed(tmp_path / "home")
    first = shown()
    assert (first.certificate, shown()) == (device.certificate, first)
    certificate = authority.issue_device(device.keys.request(), 200)
    hub = hub_of(device.device_id, link_address="elsewhere.example.org:9443")
    device.with_reply(hub, certificate, authority.bundle)
    assert (shown().certificate, shown().link_address) == (certificate, hub.link_address)
    whole = (device.folder / "hub.json").read_bytes()
    (device.folder / "hub.json").write_text("{")  # damaged: what was read before still serves
    assert shown().certificate == certificate
    later = Renewed(tmp_path / "home")  # it begins while that is so, and has no other
    with pytest.raises(CloudError, match="identity is damaged"):
        later()
    (device.folder / "hub.json").write_bytes(whole + b" ")
    assert later().certificate == certificate
