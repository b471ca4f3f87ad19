"""Drafts of releases: variants that have passed their gate and wait for a signature, tier by tier.

A draft is a manifest without its final version, in the content store as all objects that it names. Its id is
made of the manifest's digest, so the same draft is never there twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Final, Literal

import sqlalchemy as sa

from fedge.errors import AbsentError, UserError
from fedge.manifest import MAX_BYTES, Release
from fedge_server.registry import schema
from fedge_server.registry.engine import reading, storable, writing
from fedge_server.registry.store import ContentStore

Status = Literal["waiting", "refused", "published"]

VERSION: Final = 1  # of the manifest of a draft: any will do until it is published
_drafts, _variants = schema.drafts, schema.draft_variants


@dataclass(frozen=True, slots=True)
class DraftVariant:
    """What became of a draft in one tier."""

    tier: str
    status: Status
    reason: str  # why it waits or was refused
    release: int | None  # the version under which it was published
    retired: float | None = None  # Unix seconds: since then its bytes are not kept


@dataclass(frozen=True, slots=True)
class Draft:
    """A release that is not signed yet, or not for all its tiers."""

    id: str
    created: str
    release: Release  # its version means nothing
    variants: tuple[DraftVariant, ...]

    @property
    def open(self) -> tuple[str, ...]:
        """Tiers for which it is not published, and can still be."""
        kept = (each for each in self.variants if each.retired is None)
        return tuple(each.tier for each in kept if each.status != "published")


class Drafts:
    """The drafts of a registry."""

    def __init__(self, engine: sa.Engine, store: ContentStore) -> None:
        self._engine, self._store = engine, store

    def add(self, release: Release) -> str:
        """Keep a draft, whose objects are in the store already; returns its id.

        Raises:
            AbsentError: one of them is not.
        """
        with self._store.adding(), writing(self._engine) as connection:
            self._check(release)
            digest = self._store.put(release.to_bytes())
            name = digest[:12]
            values = {
                "run_id": release.lineage.run,
                "manifest": digest,
                "created": _now(),
                "global_model": release.lineage.global_model,
            }
            if connection.scalar(sa.select(_drafts.c.id).where(_drafts.c.id == name)) is None:
                connection.execute(_drafts.insert().values(id=name, **values))
                rows = [
                    {
                        "draft": name,
                        "tier": entry.tier,
                        "status": "waiting",
                        "reason": "",
                        "wire": entry.wire_sha256,
                        "evidence": entry.evidence_sha256,
                        "golden": entry.golden_sha256,
                        "reference": entry.reference_sha256,
                    }
                    for entry in release.variants
                ]
                connection.execute(_variants.insert(), rows)
            else:  # it may have been refused and retired since; its objects are there again
                connection.execute(_variants.update().where(_variants.c.draft == name).values(retired=None))
        return name

    def _check(self, release: Release) -> None:
        for entry in release.variants:
            named = (entry.wire_sha256, entry.evidence_sha256, entry.golden_sha256, entry.reference_sha256)
            for digest in filter(None, named):
                if not self._store.has(digest):
                    raise AbsentError(f"draft: object {digest[:8]} of tier {entry.tier} is not in the store")

    def untouched(self, release: Release) -> str | None:
        """The draft of this very content of which nothing is published yet, whenever it was made.

        A run that was killed, or asked for its variants again, goes on with the one it has.
        """
        for draft in self.all(unpublished=True):
            if len(draft.open) == len(draft.variants) and draft.release == replace(
                release, version=draft.release.version, created=draft.release.created
            ):
                return draft.id
        return None

    def get(self, draft: str) -> Draft:
        """One draft.

        Raises:
            UserError: there is none of this name.
        """
        query = sa.select(_drafts).where(_drafts.c.id == draft)
        with reading(self._engine) as connection:
            row = connection.execute(query).mappings().first() if storable(draft) else None
            if row is None:
                raise UserError(f"draft {draft[:60]!r}: there is none; see fedge-server release ls")
            return self._draft(connection, row)

    def all(self, *, unpublished: bool = False) -> list[Draft]:
        """Drafts, oldest first; with `unpublished` those alone that are not whole yet, and can still be."""
        query = sa.select(_drafts).order_by(_drafts.c.created, _drafts.c.id)
        if unpublished:
            open_ones = sa.select(_variants.c.draft).where(
                _variants.c.status != "published", _variants.c.retired.is_(None)
            )
            query = query.where(_drafts.c.id.in_(open_ones))
        with reading(self._engine) as connection:
            return [self._draft(connection, row) for row in connection.execute(query).mappings()]

    def of_run(self, run_id: str) -> list[Draft]:
        """Drafts that a run has made, oldest first."""
        query = sa.select(_drafts).where(_drafts.c.run_id == run_id).order_by(_drafts.c.created, _drafts.c.id)
        with reading(self._engine) as connection:
            return [self._draft(connection, row) for row in connection.execute(query).mappings()]

    def _draft(self, connection: sa.Connection, row: Mapping[Any, Any]) -> Draft:
        query = sa.select(_variants).where(_variants.c.draft == row["id"]).order_by(_variants.c.tier)
        found = tuple(
            DraftVariant(each["tier"], each["status"], each["reason"], each["release"], each["retired"])
            for each in connection.execute(query).mappings()
        )
        manifest = Release.from_bytes(self._store.get(row["manifest"], MAX_BYTES))
        return Draft(row["id"], row["created"], manifest, found)


def mark(
    connection: sa.Connection,
    draft: str,
    tier: str,
    status: Status,
    *,
    reason: str = "",
    release: int | None = None,
) -> None:
    """Write down what became of a draft in a tier, within the transaction of its cause."""
    row = (_variants.c.draft == draft) & (_variants.c.tier == tier)
    values = {"status": status, "reason": reason.replace("\0", "")[:4000], "release": release}
    connection.execute(_variants.update().where(row).values(**values))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")
