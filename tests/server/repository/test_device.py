"""fedge's own device library trusts what fedge's publisher writes, with the names that both share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from places import Place, forge, keys_of, model_of, new_key
from tuf.api.metadata import Metadata

from fedge.artefact import pack
from fedge.delivery import ReleaseNote, TierMark, mark_path, target_path
from fedge.errors import ExpiredError, SignatureError
from fedge.manifest import Release
from fedge_client.updater import Trust
from fedge_server.repository.folder import hashed_path


def trust_of(place: Place, home: Path) -> Trust:
    def fetch(name: str, maximum: int, offset: int = 0, /) -> Iterator[bytes]:
        yield (place.path / "metadata" / name).read_bytes()[offset:]

    return Trust(home, place.first_root, fetch, clock=place.clock)


def test_mark_notes_manifest_and_model_of_a_tier_are_found(place: Place, tmp_path: Path) -> None:
    place.publish(1, floors={"micro": 1})
    trusted = trust_of(place, tmp_path / "device").refresh()
    found = trusted.target(mark_path("micro"))
    assert found is not None
    mark = TierMark.from_json(found.custom)
    assert (mark.floor, mark.newest) == (1, 1)
    manifest = trusted.target(target_path("micro", mark.newest, "manifest"))
    model = trusted.target(target_path("micro", mark.newest, "model"))
    assert manifest is not None
    assert model is not None
    note = ReleaseNote.from_json(manifest.custom)
    assert note == ReleaseNote.from_json(model.custom)
    data = (place.path / "targets" / hashed_path(manifest.path, manifest.sha256)).read_bytes()
    assert (manifest.sha256, manifest.length) == (note.manifest, len(data))
    entry = Release.from_bytes(data).variant("micro")
    assert (entry.wire_sha256, entry.wire_bytes) == (model.sha256, model.length)
    wire = (place.path / "targets" / hashed_path(model.path, model.sha256)).read_bytes()
    assert wire == pack(model_of(1))


def test_rotation_is_followed_and_stolen_keys_and_old_dates_are_refused(place: Place, tmp_path: Path) -> None:
    place.publish(1)
    trust = trust_of(place, tmp_path / "device")
    trust.refresh()
    old, new = place.keys["timestamp"], [new_key()]
    place.repository.rotate("timestamp", keys_of(*new), [*place.all(), *new])
    place.keys["timestamp"] = new
    place.publish(2)
    assert _newest(trust) == 2
    held = Metadata.from_file(str(max((place.path / "metadata").glob("*.tier-micro.json"))))
    held.signed.version += 1
    held.sign(old[0]._signer)
    forge(place, micro=held.to_bytes())
    with pytest.raises(SignatureError):
        _newest(trust)
    place.clock.now = place.clock.now.replace(year=2027)
    with pytest.raises(ExpiredError):
        trust.refresh()


def _newest(trust: Trust) -> int:
    found = trust.refresh().target(mark_path("micro"))
    assert found is not None
    return TierMark.from_json(found.custom).newest
