"""The references of published releases, for the store: read once each, for a manifest does not change."""

from __future__ import annotations

from collections.abc import Callable

from fedge.errors import FedgeError
from fedge.manifest import Release
from fedge.telemetry.reference import MAX_BYTES, Reference
from fedge_server.registry.database import Registry
from fedge_server.telemetry.store import References

ReadRelease = Callable[[int], Release]
"""A published release by its version; raises AbsentError where there is none."""


def references(registry: Registry, release: ReadRelease) -> References:
    """Finds them by tier and version; None where the release has none, or its object is lost or damaged."""
    known: dict[tuple[str, int], Reference | None] = {}  # as many as there are releases

    def find(tier: str, version: int) -> Reference | None:
        place = (tier, version)
        if place not in known:
            try:
                found = release(version)
                digest = found.variant(tier).reference_sha256
                data = registry.store.get(digest, MAX_BYTES) if digest else b""
                known[place] = Reference.from_bytes(data, found.spec) if digest else None
            except FedgeError:
                return None  # not there yet, or not for this tier: it is looked for again
        return known[place]

    return find
