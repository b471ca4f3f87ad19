"""From a version that runs on a device back to the anonymous set of updates, and on to its rollout."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

import sqlalchemy as sa

from fedge.artefact import unpack
from fedge.errors import UserError
from fedge.manifest import MAX_BYTES, Release
from fedge_server.registry import schema
from fedge_server.registry.database import Registry
from fedge_server.registry.engine import reading
from fedge_server.registry.living import when
from fedge_server.repository.repository import MAX_REPORT_BYTES
from fedge_server.rollout import records

_reports = schema.rollout_reports.c


def released(registry: Registry) -> list[Release]:
    """Every release whose manifest is kept, oldest first."""
    return [
        Release.from_bytes(registry.store.get(row["manifest"], MAX_BYTES))
        for row in registry.releases()
        if registry.store.has(row["manifest"])
    ]


def release_of(registry: Registry, version: int) -> Release:
    """One release.

    Raises:
        UserError: there is none of this version.
    """
    found = {release.version: release for release in released(registry)}
    if version not in found:
        known = ", ".join(map(str, found)) or "none"
        raise UserError(f"release {version}: there is none; releases: {known}")
    return found[version]


def all_removed(registry: Registry) -> dict[int, dict[str, float]]:
    """By release: tiers for which its bytes are not kept any more, and since when (Unix seconds)."""
    variants = schema.variants.c
    query = sa.select(variants.release, variants.tier, variants.retired).where(variants.retired.is_not(None))
    found: dict[int, dict[str, float]] = {}
    with reading(registry.engine) as connection:
        for row in connection.execute(query):
            found.setdefault(row.release, {})[row.tier] = row.retired
    return found


def removed(registry: Registry, version: int) -> dict[str, float]:
    """The same of one release; empty: all of it is kept."""
    return all_removed(registry).get(version, {})


def why_removed(tiers: Mapping[str, float]) -> str:
    """That bytes of a release were removed, of one tier or more, and what to do."""
    return (
        f"its bytes for {', '.join(sorted(tiers))} were removed {when(max(tiers.values()))}, as newer "
        "releases took their place ([keeping] releases); publish a newer one, or restore a backup from before"
    )


def last_variants(registry: Registry, tiers: Collection[str], *, besides: str) -> dict[str, bytes]:
    """The installed bytes of each tier's newest release, as far as they are kept.

    Args:
        registry: of the releases.
        tiers: their names.
        besides: SHA-256 of a global model whose releases are passed over: what is made of it again comes out
            as it did the first time.
    """
    found: dict[str, bytes] = {}
    for row in reversed(registry.releases()):
        if row["global_model"] == besides or len(found) == len(tiers):
            continue
        if not registry.store.has(row["manifest"]):
            continue
        release = Release.from_bytes(registry.store.get(row["manifest"], MAX_BYTES))
        for entry in release.variants:
            if entry.tier in tiers and entry.tier not in found and registry.store.has(entry.wire_sha256):
                wire = registry.store.get(entry.wire_sha256, entry.wire_bytes)
                found[entry.tier] = unpack(wire, entry.installed_bytes)
    return found


def story(registry: Registry, release: Release) -> dict[str, Any]:
    """All that is known of where a release comes from and how far it has got, as plain JSON values."""
    rounds = {record.round: record for record in registry.records(release.lineage.run)}
    record, first = rounds.get(release.lineage.round), rounds.get(0)
    with reading(registry.engine) as connection:
        rollouts = {
            entry.tier: records.read_rollout(connection, f"{entry.tier}-{release.version}")
            for entry in release.variants
        }
    return release.to_json() | {
        "round": record.to_json() if record else None,
        "origin": dict(first.origin) if first is not None else {},
        "reports": {entry.tier: _report(registry, entry.evidence_sha256) for entry in release.variants},
        "rollouts": {tier: state and state.to_json() for tier, state in rollouts.items()},
        "removed": removed(registry, release.version),
    }


def running_on(registry: Registry, device_id: str) -> dict[str, Any]:
    """The version that a device has reported last as installed, with its tier.

    Raises:
        UserError: there is no such device, or it has reported nothing.
    """
    device = registry.devices.get(device_id)
    if device is None:
        raise UserError(f"device {device_id[:64]!r}: there is none")
    query = (
        sa.select(_reports.version, _reports.kind, _reports.reported)
        .where(_reports.device_id == device_id, _reports.kind != "install_failed")
        .order_by(_reports.reported.desc(), _reports.version.desc())
        .limit(1)
    )
    with reading(registry.engine) as connection:
        row = connection.execute(query).mappings().first()
    if row is None:
        raise UserError(f"device {device_id[:16]}: has not reported that it runs a release")
    return {"id": device_id, "tier": device.tier, **row}


def _report(registry: Registry, digest: str) -> dict[str, Any]:
    """The gate's report, if it is kept."""
    if not registry.store.has(digest):
        return {}
    value = json.loads(registry.store.get(digest, MAX_REPORT_BYTES))
    return value if isinstance(value, dict) else {}
