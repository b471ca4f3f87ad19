"""A stick for devices without a network: enough for them, and nothing for others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from places import Client, Place, model_of

from fedge.artefact import pack
from fedge.errors import ForbiddenError, UserError
from fedge.sealing import Place as SealingPlace
from fedge.sealing import key_id, unseal, unwrap
from fedge_server.registry.devices import DeviceRow
from fedge_server.repository import ContentKeys
from fedge_server.repository.stick import Stick, write_stick

DEVICE = X25519PrivateKey.generate()
ROW = DeviceRow(
    id="ab" * 32, node_id=1, tier="micro", status="active", reason="", public_key="",
    sealing_key=DEVICE.public_key().public_bytes_raw().hex(), enrolled=0.0, revoked=None, last_seen=None,
    certificate_not_after=0.0, wire_version=2, fedge_version="", bundle="",
)  # fmt: skip


def written(place: Place, folder: Path, *rows: DeviceRow, name: str = "stick") -> Stick:
    return write_stick(place.path, ContentKeys(folder / "keys"), folder / name, rows or [ROW])


@pytest.fixture
def sealing_place(tmp_path: Path) -> Place:
    options = {"content_keys": ContentKeys(tmp_path / "keys")}
    return Place(tmp_path / "repository", options=options).make()


def test_a_device_verifies_and_opens_what_is_on_it(sealing_place: Place, tmp_path: Path) -> None:
    sealing_place.publish(1)
    sealing_place.publish(2, "micro")
    stick = written(sealing_place, tmp_path)
    assert (stick.tiers, stick.keys) == (("micro",), 2)
    assert stick.expires > sealing_place.clock.now

    copied = replace(sealing_place, path=tmp_path / "stick")
    ciphertext = Client(tmp_path / "device", copied).model()
    wrapped = (tmp_path / "stick" / "keys" / "micro" / "2" / ROW.id).read_bytes()
    name = key_id(ContentKeys(tmp_path / "keys").key("micro", 2))
    key = unwrap(wrapped, DEVICE, tier="micro", version=2, device_id=ROW.id, expected=name)
    assert unseal(ciphertext, key, SealingPlace("micro", 2)) == pack(model_of(2))


def test_other_tiers_and_the_publishers_own_files_are_not_on_it(sealing_place: Place, tmp_path: Path) -> None:
    sealing_place.publish(1)
    stick = written(sealing_place, tmp_path)
    names = [str(path.relative_to(tmp_path / "stick")) for path in (tmp_path / "stick").rglob("*")]
    assert not [name for name in names if "board" in name or "state" in name]
    files = [path for path in (tmp_path / "stick").rglob("*") if path.is_file()]
    assert stick.size == sum(path.stat().st_size for path in files)
    content_key = ContentKeys(tmp_path / "keys").key("micro", 1)
    assert all(content_key not in path.read_bytes() for path in files)


def test_it_is_written_for_devices_that_may_have_it_and_into_an_empty_folder(
    sealing_place: Place, tmp_path: Path
) -> None:
    sealing_place.publish(1)
    with pytest.raises(ForbiddenError):
        written(sealing_place, tmp_path, ROW, replace(ROW, status="revoked"))
    with pytest.raises(UserError, match="not in this repository"):
        written(sealing_place, tmp_path, replace(ROW, tier="nano"))
    assert not (tmp_path / "stick").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "photo.jpg").touch()
    with pytest.raises(UserError, match="holds something already"):
        written(sealing_place, tmp_path, name="full")


def test_of_an_unsealed_repository_it_has_no_keys(place: Place, tmp_path: Path) -> None:
    place.publish(1)
    assert written(place, tmp_path).keys == 0
    assert not (tmp_path / "stick" / "keys").exists()


def test_without_a_repository_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no repository"):
        write_stick(tmp_path / "nothing", ContentKeys(tmp_path / "keys"), tmp_path / "stick", [ROW])
