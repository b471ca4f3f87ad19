"""A repository with keys in memory, releases to publish, and python-tuf's own client as the device."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tuf.api.exceptions import DownloadHTTPError
from tuf.api.metadata import Metadata, MetaFile, Snapshot, TargetFile, Timestamp
from tuf.ngclient import Updater
from tuf.ngclient._internal import trusted_metadata_set
from tuf.ngclient.fetcher import FetcherInterface

from fedge import Spec, golden
from fedge.artefact import pack
from fedge.delivery import TierMark, mark_path, target_path
from fedge.files import sha256
from fedge.manifest import Lineage, Release, VariantEntry
from fedge_server.repository import FileSigning, Repository, RoleKeys
from fedge_server.repository.folder import Folder
from fedge_server.repository.repository import Draft
from fedge_server.repository.state import load

TOP = ("root", "targets", "snapshot", "timestamp")
START = datetime(2026, 3, 1, 12, tzinfo=UTC)
SPEC = Spec("image", (8, 8), "uint8", ("no", "yes"))


def new_key() -> FileSigning:
    return FileSigning(Ed25519PrivateKey.generate())


def keys_of(*signers: FileSigning, threshold: int = 1) -> RoleKeys:
    return RoleKeys(tuple(signer.key for signer in signers), threshold)


def report_of(**changes: Any) -> bytes:
    figures = {"passed": True, "reasons": [], "drop_upper": 0.008, "max_drop": 0.01, "max_class_drop": None}
    return json.dumps({**figures, **changes}, sort_keys=True).encode()


def golden_of(spec: Spec = SPEC) -> bytes:
    """Of a variant that always answers one half."""
    return golden.write(spec, 0, np.full((golden.count_of(spec), spec.classes), 0.5, np.float32))


def model_of(number: int) -> bytes:
    return b"model %d" % number * 50


def release_of(
    number: int, *tiers: str, report: bytes = report_of(), **changes: Any
) -> tuple[Draft, list[bytes]]:
    """A draft, and the objects that it names."""
    model = model_of(number)
    wire = pack(model)
    entries = tuple(
        VariantEntry(
            tier=tier, recipe="int8", wire_sha256=sha256(wire), wire_bytes=len(wire),
            installed_sha256=sha256(model), installed_bytes=len(model), evidence_sha256=sha256(report),
            golden_sha256=sha256(golden_of(changes.get("spec", SPEC))),
        )
        for tier in tiers
    )  # fmt: skip

    def draft(version: int) -> Release:
        values: dict[str, Any] = {
            "version": version, "task": "digits", "created": "2026-01-31T12:00:00Z", "spec": SPEC,
            "lineage": Lineage("run-1", number, "a" * 64, "b" * 64), "variants": entries,
        }  # fmt: skip
        return Release(**{**values, **changes})

    return draft, [wire, report, golden_of(changes.get("spec", SPEC))]


class Clock:
    """A time that tests set."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> datetime:
        return self.now


@dataclass
class Place:
    """A repository with two tiers, and all its keys."""

    path: Path
    clock: Clock = field(default_factory=Clock)
    options: dict[str, Any] = field(default_factory=dict)
    keys: dict[str, list[FileSigning]] = field(
        default_factory=lambda: {
            "root": [new_key(), new_key(), new_key()],
            **{
                role: [new_key()] for role in ("targets", "snapshot", "timestamp", "tier-micro", "tier-board")
            },
        }
    )
    first_root: bytes = b""

    @property
    def repository(self) -> Repository:
        return Repository(self.path, clock=self.clock, patience_s=5.0, **self.options)

    def make(self) -> Place:
        top = {role: keys_of(*self.keys[role], threshold=2 if role == "root" else 1) for role in TOP}
        self.first_root = self.repository.create(top, self.all())  # type: ignore[arg-type]
        for tier in ("micro", "board"):
            self.repository.add_tier(tier, keys_of(*self.keys[f"tier-{tier}"]), self.all())
        return self

    def all(self) -> list[FileSigning]:
        return [signer for held in self.keys.values() for signer in held]

    def of(self, *roles: str) -> list[FileSigning]:
        return [signer for role in (*roles, "snapshot", "timestamp") for signer in self.keys[role]]

    def publish(
        self, number: int, *tiers: str, signing: Sequence[Any] | None = None, **options: Any
    ) -> Release:
        tiers = tiers or ("micro", "board")
        draft, objects = release_of(number, *tiers)
        signing = self.of(*(f"tier-{tier}" for tier in tiers)) if signing is None else signing
        return self.repository.publish(draft, objects, signing, **options)

    def files(self) -> dict[str, bytes]:
        """All that devices can read."""
        return {
            str(path.relative_to(self.path)): path.read_bytes()
            for folder in ("metadata", "targets")
            for path in sorted((self.path / folder).rglob("*"))
            if path.is_file()
        }


class FolderFetcher(FetcherInterface):
    """Serves a repository's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def _fetch(self, url: str) -> Iterator[bytes]:
        try:
            data = (self.path / url.removeprefix("folder:///")).read_bytes()
        except FileNotFoundError as error:
            raise DownloadHTTPError("absent", 404) from error
        return iter([data])


@dataclass
class Client:
    """A device: python-tuf's client with a folder of its own, at the time of the clock."""

    home: Path
    place: Place
    root: bytes = b""

    def updater(self) -> Updater:
        (self.home / "metadata").mkdir(parents=True, exist_ok=True)
        return Updater(
            str(self.home / "metadata"), "folder:///metadata/", str(self.home), "folder:///targets/",
            FolderFetcher(self.place.path), bootstrap=self.root or self.place.first_root,
        )  # fmt: skip

    def look(self, path: str, *, late: timedelta = timedelta()) -> TargetFile | None:
        now = self.place.clock.now + late
        with mock.patch.object(trusted_metadata_set, "datetime", _Time(now)):
            return self.updater().get_targetinfo(path)

    def mark(self, tier: str = "micro", *, late: timedelta = timedelta()) -> TierMark:
        found = self.look(mark_path(tier), late=late)
        assert found is not None
        return TierMark.from_json(found.custom)

    def model(self, tier: str = "micro") -> bytes:
        """The newest model of a tier, verified."""
        with mock.patch.object(trusted_metadata_set, "datetime", _Time(self.place.clock.now)):
            updater = self.updater()
            mark = updater.get_targetinfo(mark_path(tier))
            assert mark is not None
            found = updater.get_targetinfo(target_path(tier, TierMark.from_json(mark.custom).newest, "model"))
            assert found is not None
            return Path(updater.download_target(found)).read_bytes()


class _Time:
    """`datetime` as python-tuf's client imports it, at a fixed time."""

    timezone = __import__("datetime").timezone

    def __init__(self, now: datetime) -> None:
        self.datetime = mock.Mock(now=lambda zone: now.astimezone(zone))


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
    snapshot.expires = place.clock.now + timedelta(days=1)
    signed = Metadata(snapshot)
    signed.sign(place.keys["snapshot"][0]._signer)
    data = signed.to_bytes()
    (place.path / f"metadata/{snapshot.version}.snapshot.json").write_bytes(data)
    named = MetaFile.from_data(snapshot.version, data, ["sha256"])
    old = Metadata[Timestamp].from_file(str(place.path / "metadata/timestamp.json"))
    timestamp = Metadata(Timestamp(old.signed.version + 1, None, place.clock.now + timedelta(days=1), named))
    timestamp.sign(place.keys["timestamp"][0]._signer)
    (place.path / "metadata/timestamp.json").write_bytes(timestamp.to_bytes())


def repository(rig: Any) -> Place:
    """A hub's own."""
    return Place(rig.home.repository).make()


def released(rig: Any, place: Place, number: int, *tiers: str, **options: Any) -> int:
    """Publish a release, and write it down as the publisher does."""
    if not rig.registry.releases():
        rig.registry.begin_run("run-1", task="digits", seed=0, config={}, data="")
    release = place.publish(number, *tiers, **options)
    rig.registry.record_release(
        version=release.version,
        run_id="run-1",
        round_number=1,
        global_model="",
        manifest=release.to_bytes(),
        variants=[
            {
                "tier": e.tier,
                "recipe": "int8",
                "wire": e.wire_sha256,
                "installed": e.installed_sha256,
                "evidence": "",
            }
            for e in release.variants
        ],
    )
    return release.version
