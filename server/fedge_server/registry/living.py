"""Which objects of the store the database needs: all that its rows name, but for what has been retired.

Rows are never removed. One that is retired still says what there was, and no longer keeps its big bytes.
Manifests and the gate's reports, a few kilobytes each, stay for ever: they are what lineage is read from.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import sqlalchemy as sa

from fedge_server.registry import schema

OVER: Final = ("done", "failed", "stopped")  # statuses of a run that nobody works on

_runs, _rounds = schema.runs.c, schema.rounds.c
_releases, _variants = schema.releases.c, schema.variants.c
_drafts, _drafted = schema.drafts.c, schema.draft_variants.c


@dataclass(frozen=True, slots=True)
class Retired:
    """Rows whose bytes are no longer kept."""

    variants: frozenset[tuple[int, str]] = frozenset()  # release and tier
    drafts: frozenset[tuple[str, str]] = frozenset()  # draft and tier
    runs: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.variants or self.drafts or self.runs)

    @property
    def tiers(self) -> dict[int, list[str]]:
        """Of each release that lost something."""
        versions = sorted({version for version, _ in self.variants})
        return {v: sorted(tier for version, tier in self.variants if version == v) for v in versions}

    def lines(self) -> list[str]:
        """What it is, for people; what is done to it is the caller's to say."""
        said = [f"release {version}: tiers {', '.join(tiers)}" for version, tiers in self.tiers.items()]
        said += [f"draft {draft}: tier {tier}, which was refused" for draft, tier in sorted(self.drafts)]
        return said + [f"run {run}: model and state of its last round" for run in sorted(self.runs)]


NOTHING: Final = Retired()


def when(retired: float) -> str:
    """Since when something is not kept, for people."""
    return f"on {datetime.fromtimestamp(retired, UTC):%Y-%m-%d at %H:%M} UTC"


def living(connection: sa.Connection, *, rounds: int, besides: Retired = NOTHING) -> list[str]:
    """Digests of the objects that are needed, without doubles; those of unfinished runs first.

    Args:
        connection: its transaction is the state that counts.
        rounds: last ones of a run that is under way; of one that is over it is the last one.
        besides: rows to be taken as retired, on top of those that are.
    """
    found = [*_of_runs(connection, rounds, besides), *_for_ever(connection)]
    drafted = _open(connection, besides)
    for draft in drafted:
        found += [draft.wire, draft.evidence, draft.golden, draft.reference]
    found += drafted_models(connection, {draft.draft for draft in drafted})
    for row in connection.execute(_kept_variants()):
        if (row.version, row.tier) not in besides.variants:
            found += [row.global_model, row.wire, row.golden, row.reference]
    return [digest for digest in dict.fromkeys(found) if digest]


def spared(connection: sa.Connection) -> set[str]:
    """Objects of releases of the first fedge: some were kept, so those that lie there are left there."""
    first = sa.select(_variants.wire, _variants.evidence, _releases.manifest, _releases.global_model)
    rows = connection.execute(
        first.select_from(schema.releases.join(schema.variants)).where(_variants.golden == "")
    )
    manifests = connection.scalars(sa.select(_releases.manifest))
    return {digest for row in rows for digest in row} | set(manifests)


def drafted_models(connection: sa.Connection, drafts: Collection[str] | None = None) -> list[str]:
    """Global models of drafts that may still be published: their releases will name them.

    Args:
        connection: to the database.
        drafts: their ids; None: all whose bytes are kept and that are not published.
    """
    ids = {row.draft for row in _open(connection, NOTHING)} if drafts is None else drafts
    query = sa.select(_drafts.id, _drafts.run_id, _drafts.global_model)
    rows = [row for row in connection.execute(query) if row.id in ids]
    found = [row.global_model for row in rows]
    if of := {row.run_id for row in rows if not row.global_model}:  # of an earlier fedge: one of these
        released = sa.select(_releases.run_id, _releases.global_model)
        last = _last_rounds(1)
        both = [*connection.execute(released), *((row.run_id, row.model) for row in connection.execute(last))]
        found += [model for run_id, model in both if run_id in of]
    return found


def kept_models(connection: sa.Connection, besides: Retired = NOTHING) -> set[str]:
    """Global models that devices may be answered by: of kept releases, and of drafts that may become some."""
    query = sa.select(_releases.global_model, _releases.version, _variants.tier)
    query = query.select_from(schema.releases.join(schema.variants)).where(_variants.retired.is_(None))
    rows = connection.execute(query)
    kept = {row.global_model for row in rows if (row.version, row.tier) not in besides.variants}
    return kept | set(drafted_models(connection))


def _of_runs(connection: sa.Connection, rounds: int, besides: Retired) -> Iterator[str]:
    for row in connection.execute(_last_rounds(rounds)):
        retired = row.retired is not None or row.run_id in besides.runs
        if not (retired and row.status in OVER):  # one that goes on needs what it goes on from
            yield from (row.model, row.state)


def _last_rounds(rounds: int) -> sa.Select[Any]:
    """Run, status, model, state and `retired` of each run's last rounds, of unfinished runs first."""
    last = sa.select(_rounds.run_id, sa.func.max(_rounds.number).label("number")).group_by(_rounds.run_id)
    newest, over = last.subquery(), _runs.status.in_(OVER)
    of_run = (_rounds.run_id == newest.c.run_id) & (
        _rounds.number > newest.c.number - sa.case((over, 1), else_=rounds)
    )
    return (
        sa.select(_rounds.run_id, _runs.status, _rounds.model, _rounds.state, _runs.retired)
        .select_from(schema.rounds.join(schema.runs).join(newest, of_run))
        .order_by(over, _runs.created.desc(), _rounds.number.desc())
    )


def _open(connection: sa.Connection, besides: Retired) -> list[Any]:
    """Rows of drafts that are not published, and whose bytes are kept."""
    query = sa.select(
        _drafted.draft, _drafted.tier, _drafted.wire, _drafted.evidence, _drafted.golden, _drafted.reference
    ).where(_drafted.status != "published", _drafted.retired.is_(None))
    return [row for row in connection.execute(query) if (row.draft, row.tier) not in besides.drafts]


def _kept_variants() -> sa.Select[Any]:
    """Those whose objects are in the store; of the first fedge none were."""
    return (
        sa.select(
            _releases.version,
            _releases.global_model,
            _variants.tier,
            _variants.wire,
            _variants.golden,
            _variants.reference,
        )
        .select_from(schema.releases.join(schema.variants))
        .where(_variants.retired.is_(None), _variants.golden != "")
        .order_by(_releases.version.desc())
    )


def _for_ever(connection: sa.Connection) -> Iterator[str]:
    """What lineage is read from."""
    whole = _variants.golden != ""
    yield from connection.scalars(sa.select(_drafts.manifest))
    yield from connection.scalars(sa.select(_variants.evidence).where(whole))
    with_objects = sa.select(_variants.release).where(whole)
    yield from connection.scalars(sa.select(_releases.manifest).where(_releases.version.in_(with_objects)))
    # Releases without a variant, or of the first fedge: their model alone was ever kept.
    yield from connection.scalars(
        sa.select(_releases.global_model).where(~_releases.version.in_(with_objects))
    )
