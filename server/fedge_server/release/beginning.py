"""Rollouts that begin by themselves, in the transaction that writes a signed release down."""

from __future__ import annotations

import time
from collections.abc import Callable

import sqlalchemy as sa

from fedge.errors import UserError
from fedge.manifest import Release
from fedge_server.registry.database import Registry
from fedge_server.release.place import ReleasePlace
from fedge_server.rollout.audit import append
from fedge_server.rollout.plan import Plan
from fedge_server.rollout.service import Rollouts

AUTOMATIC = "automatic"  # who, in the audit trail

Begin = Callable[[sa.Connection, Release], None]
"""Begins the rollouts of a release, within a transaction that has written it down."""


def beginning(place: ReleasePlace, registry: Registry) -> Begin:
    """What `[rollouts]` of the server's settings says; the plan is read now, before anything is signed.

    A rollout that may not begin, since a way back comes first, or that the plan does not fit, is left to a
    person: the audit trail says why.

    Raises:
        UserError: the plan's file cannot be used.
    """
    if not place.rollouts.automatic:
        return lambda _, __: None
    plan = Plan.load(place.home / place.rollouts.plan) if place.rollouts.plan else None
    rollouts = Rollouts(registry)

    def begin(connection: sa.Connection, release: Release) -> None:
        for entry in release.variants:
            try:
                rollouts.start_within(connection, release.version, entry.tier, plan, who=AUTOMATIC)
            except UserError as error:
                subject = f"{entry.tier}-{release.version}"
                what, now = "rollout not begun", time.time()
                append(connection, at=now, who=AUTOMATIC, what=what, subject=subject, why=str(error))

    return begin
