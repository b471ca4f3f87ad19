"""A TUF repository in memory, of python-tuf's metadata classes: it can lie where a real one cannot."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)

from fedge.errors import AbsentError

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
YEAR = NOW + timedelta(days=365)
TOP = ("root", "timestamp", "snapshot", "targets")


class Repository:
    """Signed metadata of every role, and the files that a fetcher is given."""

    def __init__(self, expires: datetime = YEAR) -> None:
        self.expires = expires
        self.keys = {role: [CryptoSigner.generate_ed25519()] for role in TOP}
        self.root = Root(expires=expires, consistent_snapshot=True)
        self.timestamp, self.snapshot = Timestamp(expires=expires), Snapshot(expires=expires)
        self.targets: dict[str, Targets] = {"targets": Targets(expires=expires)}
        for role in TOP:
            self.root.add_key(self.keys[role][0].public_key, role)
        self.files: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.root.version = 0
        self.publish_root()
        self.trusted_root = self.files["1.root.json"]
        self.publish()

    # What a publisher does

    def signed(self, payload: Any, role: str, keys: list[CryptoSigner] | None = None) -> bytes:
        metadata: Metadata[Any] = Metadata(copy.deepcopy(payload))
        for key in keys or self.keys[role]:
            metadata.sign(key, append=True)
        return metadata.to_bytes()

    def publish_root(self, *also: CryptoSigner) -> None:
        self.root.version += 1
        keys = [*self.keys["root"], *also]
        self.files[f"{self.root.version}.root.json"] = self.signed(self.root, "root", keys)

    def publish_targets(self, role: str = "targets", keys: list[CryptoSigner] | None = None) -> None:
        """A new version of a targets role; name it in a snapshot with `publish`."""
        self.targets[role].version += 1
        self.put_targets(role, keys)

    def put_targets(self, role: str, keys: list[CryptoSigner] | None = None) -> None:
        data, version = self.signed(self.targets[role], role, keys), self.targets[role].version
        self.files[f"{version}.{quote(role, '')}.json"] = data
        self.snapshot.meta[f"{role}.json"] = _file(version, data)

    def publish(self) -> None:
        """Snapshot and timestamp over what is there."""
        if "1.targets.json" not in self.files:
            self.put_targets("targets")
        else:
            self.snapshot.version += 1
        data = self.signed(self.snapshot, "snapshot")
        self.files[f"{self.snapshot.version}.snapshot.json"] = data
        self.timestamp.snapshot_meta = _file(self.snapshot.version, data)
        self.publish_timestamp()

    def publish_timestamp(self) -> None:
        self.timestamp.version += "timestamp.json" in self.files
        self.files["timestamp.json"] = self.signed(self.timestamp, "timestamp")

    def rotate(self, role: str) -> CryptoSigner:
        """A new key for a top-level role, and the old one out; returns the old one."""
        (old,), new = self.keys[role], CryptoSigner.generate_ed25519()
        self.root.revoke_key(old.public_key.keyid, role)
        self.root.add_key(new.public_key, role)
        self.keys[role] = [new]
        return old

    def delegate(self, delegator: str, role: str, *paths: str, terminating: bool = True) -> None:
        """A role for paths, with a key of its own for each delegator, so that none can stand for another."""
        key = CryptoSigner.generate_ed25519()
        self.keys.setdefault(role, [key])
        self.keys[f"{delegator}>{role}"] = [key]
        parent = self.targets[delegator]
        if parent.delegations is None:
            parent.delegations = Delegations({}, {})
        assert parent.delegations.roles is not None
        parent.delegations.roles[role] = DelegatedRole(role, [], 1, terminating, list(paths))
        parent.add_key(key.public_key, role)
        if role not in self.targets:
            self.targets[role] = Targets(expires=self.expires)
            self.put_targets(role)

    def add(self, role: str, path: str, content: bytes, custom: dict[str, Any] | None = None) -> str:
        """A target; returns the name of its file, which carries its digest."""
        target = TargetFile.from_data(path, content, ["sha256"])
        if custom is not None:
            target.unrecognized_fields["custom"] = custom
        self.targets[role].targets[path] = target
        folder, slash, name = path.rpartition("/")
        file = f"{folder}{slash}{hashlib.sha256(content).hexdigest()}.{name}"
        self.files[file] = content
        return file

    # What a device does

    def fetch(self, name: str, maximum: int, offset: int = 0, /) -> Iterator[bytes]:
        self.requests.append(name)
        if name not in self.files:
            raise AbsentError(f"{name}: not here")
        yield self.files[name][offset:]

    def write(self, folder: Path, wanted: Callable[[str], bool] = lambda _: True) -> None:
        """All files whose names are wanted, for a server or another process."""
        for name, content in self.files.items():
            if not wanted(name):
                continue
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def _file(version: int, data: bytes) -> MetaFile:
    return MetaFile(version, len(data), {"sha256": hashlib.sha256(data).hexdigest()})
