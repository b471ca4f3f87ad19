"""Which releases there are, for the Inference service, out of the registry."""

from __future__ import annotations

import sqlalchemy as sa

from fedge.errors import AbsentError
from fedge.manifest import MAX_BYTES, Release
from fedge_server.inference.exports import ReadRelease
from fedge_server.inference.models import Newest
from fedge_server.registry import schema
from fedge_server.registry.database import Registry
from fedge_server.registry.engine import reading


def reader(registry: Registry) -> ReadRelease:
    """Reads the manifest of a published release."""

    def read(version: int) -> Release:
        query = sa.select(schema.releases.c.manifest).where(schema.releases.c.version == version)
        with reading(registry.engine) as connection:
            digest = connection.execute(query).scalar()
        if digest is None or not registry.store.has(digest):
            raise AbsentError(f"there is no release {version} here")
        return Release.from_bytes(registry.store.get(digest, MAX_BYTES))

    return read


def newest(registry: Registry) -> Newest:
    """Finds the newest release that has a variant for a tier."""

    def find(tier: str) -> int:
        query = sa.select(sa.func.max(schema.variants.c.release)).where(schema.variants.c.tier == tier)
        with reading(registry.engine) as connection:
            version = connection.execute(query).scalar()
        if version is None:
            raise AbsentError(f"there is no release for tier {tier!r} yet")
        return int(version)

    return find
