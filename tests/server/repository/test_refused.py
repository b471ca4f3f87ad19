"""What python-tuf's own client refuses, whoever has taken which keys; a publisher refuses it too."""

from __future__ import annotations

from datetime import timedelta

import pytest
from places import Client, Place
from tuf.api.exceptions import (
    BadVersionNumberError,
    LengthOrHashMismatchError,
    RepositoryError,
    UnsignedMetadataError,
)
from tuf.api.metadata import Metadata, MetaFile, Snapshot, TargetFile, Timestamp

from fedge.delivery import target_path
from fedge.errors import DigestError, FormatError, SignatureError
from fedge_server.repository.folder import Folder
from fedge_server.repository.state import load

DAY = timedelta(days=1)


def forge(place: Place, **tiers: bytes) -> None:
    """What whoever has the online keys can do: any snapshot and timestamp, with other files for tiers."""
    state = load(Folder(place.path))
    assert state is not None
    meta = dict(state.snapshot.signed.meta)
    for tier, data in tiers.items():
        version = Metadata.from_bytes(data).signed.version
        (place.path / f"metadata/{version}.tier-{tier}.json").write_bytes(data)
        meta[f"tier-{tier}.json"] = MetaFile.from_data(version, data, ["sha256"])
    publish_online(place, Snapshot(state.snapshot.signed.version + 1, meta=meta))


def publish_online(place: Place, snapshot: Snapshot) -> None:
    snapshot.expires = place.clock.now + DAY
    signed = Metadata(snapshot)
    signed.sign(place.keys["snapshot"][0]._signer)
    data = signed.to_bytes()
    (place.path / f"metadata/{snapshot.version}.snapshot.json").write_bytes(data)
    named = MetaFile.from_data(snapshot.version, data, ["sha256"])
    old = Metadata[Timestamp].from_file(str(place.path / "metadata/timestamp.json"))
    timestamp = Metadata(Timestamp(old.signed.version + 1, None, place.clock.now + DAY, named))
    timestamp.sign(place.keys["timestamp"][0]._signer)
    (place.path / "metadata/timestamp.json").write_bytes(timestamp.to_bytes())


@pytest.mark.parametrize("signer", ["snapshot", "timestamp", "tier-board"])
def test_stolen_online_keys_or_another_tiers_key_ship_nothing(
    place: Place, client: Client, signer: str
) -> None:
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
    with pytest.raises(FormatError, match="micro/9.model"):
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
