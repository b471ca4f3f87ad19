"""What python-tuf's own client refuses, whoever has taken which keys; a publisher refuses it too."""

from __future__ import annotations

import shutil
from datetime import timedelta
from pathlib import Path

import pytest
from places import Client, Place, forge, keys_of, new_key, publish_online
from tuf.api.exceptions import (
    BadVersionNumberError,
    DownloadError,
    LengthOrHashMismatchError,
    RepositoryError,
    UnsignedMetadataError,
)
from tuf.api.metadata import Metadata, MetaFile, Snapshot, TargetFile

from fedge.delivery import target_path
from fedge.errors import DigestError, FormatError, SignatureError
from fedge_server.repository.folder import Folder
from fedge_server.repository.state import load

DAY = timedelta(days=1)


@pytest.mark.parametrize("signer", ["snapshot", "timestamp", "tier-board"])
def test_stolen_online_or_other_tiers_keys_ship_nothing(place: Place, client: Client, signer: str) -> None:
    place.publish(1)
    assert client.mark("micro").newest == 1
    held = Metadata.from_file(str(place.path / "metadata/2.tier-micro.json"))
    held.signed.version += 1
    held.sign(place.keys[signer][0]._signer)
    forge(place, micro=held.to_bytes())
    for device in (client, Client(client.home.parent / "fresh", place)):
        with pytest.raises(UnsignedMetadataError):
            device.mark("micro")
        assert device.mark("board").newest == 1  # the other tier is not touched
    with pytest.raises(SignatureError, match="tier-micro version 3: not signed by enough keys"):
        place.publish(2, "micro")  # nor does a publisher sign on top of it


def test_a_publisher_does_not_sign_on_top_of_a_root_that_the_one_before_has_not_signed(place: Place) -> None:
    found, thief = Metadata.from_file(str(place.path / "metadata/1.root.json")), new_key()
    for keyid in list(found.signed.roles["root"].keyids):
        found.signed.revoke_key(keyid, "root")
    found.signed.add_key(thief.key, "root")
    found.signed.roles["root"].threshold = 1
    found.signed.version = 2
    found.sign(thief._signer)
    found.to_file(str(place.path / "metadata/2.root.json"))
    with pytest.raises(SignatureError, match="root version 2: not signed by enough keys"):
        place.publish(1)


def test_a_tiers_key_reaches_no_other_tiers_paths(place: Place, client: Client) -> None:
    place.publish(1)
    held = Metadata.from_file(str(place.path / "metadata/2.tier-board.json"))
    held.signed.version += 1
    target = held.signed.targets[target_path("board", 1, "model")]
    moved = TargetFile(target.length, target.hashes, "micro/9.model", target.unrecognized_fields)
    held.signed.targets["micro/9.model"] = moved
    held.sign(place.keys["tier-board"][0]._signer)
    forge(place, board=held.to_bytes())
    assert client.mark("board").newest == 1
    assert client.look("micro/9.model") is None
    with pytest.raises(FormatError, match=r"offers 'micro/9\.model', which is none of its paths"):
        place.repository.content("board")


def test_a_device_does_not_go_back_to_an_earlier_state(place: Place, client: Client) -> None:
    place.publish(1)
    old = place.files()
    place.publish(2)
    assert client.mark().newest == 2
    for name, data in old.items():
        (place.path / name).write_bytes(data)
    with pytest.raises(BadVersionNumberError):
        client.mark()


def test_an_earlier_tier_in_a_new_snapshot_is_refused(place: Place, client: Client) -> None:
    place.publish(1, "micro")
    old = (place.path / "metadata/2.tier-micro.json").read_bytes()
    place.publish(2, "micro")
    assert client.mark().newest == 2
    forge(place, micro=old)
    with pytest.raises(BadVersionNumberError):
        client.mark()


def test_files_of_two_states_are_not_mixed(place: Place, client: Client) -> None:
    place.publish(1, "micro")
    old = (place.path / "metadata/2.tier-micro.json").read_bytes()
    place.publish(2, "micro")
    (place.path / "metadata/3.tier-micro.json").write_bytes(old)
    with pytest.raises(LengthOrHashMismatchError):
        client.mark()
    with pytest.raises(DigestError, match="tier-micro version 3"):
        place.publish(3, "micro")


def test_a_tier_that_the_snapshot_drops_is_refused(place: Place, client: Client) -> None:
    place.publish(1)
    client.mark()
    state = load(Folder(place.path))
    assert state is not None
    meta = {name: value for name, value in state.snapshot.signed.meta.items() if name != "tier-micro.json"}
    publish_online(place, Snapshot(state.snapshot.signed.version + 1, meta=meta))
    with pytest.raises(RepositoryError):
        client.mark()


def test_devices_that_thieves_of_the_online_keys_have_led_far_ahead_come_back(
    place: Place, client: Client, tmp_path: Path
) -> None:
    """A backup and new online keys are enough, though the stolen ones have signed high versions."""
    place.publish(1)
    shutil.copytree(place.path, tmp_path / "backup")
    state = load(Folder(place.path))
    assert state is not None
    publish_online(place, Snapshot(10**6, meta=dict(state.snapshot.signed.meta)))
    assert client.mark().newest == 1
    meta = {**state.snapshot.signed.meta, "tier-micro.json": MetaFile(10**6)}
    publish_online(place, Snapshot(10**6 + 1, meta=meta))
    with pytest.raises(DownloadError):
        client.mark()
    shutil.rmtree(place.path)
    shutil.copytree(tmp_path / "backup", place.path)
    for role in ("snapshot", "timestamp"):
        new = new_key()
        place.repository.rotate(role, keys_of(new), [*place.all(), new])
        place.keys[role] = [new]
    for device in (client, Client(tmp_path / "fresh", place)):
        assert device.mark().newest == 1
