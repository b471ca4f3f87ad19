"""Rows of single devices in rollouts of releases that are not kept: with many devices, most rows there are.

The rollout has their sums. What a device has reported last stays, so that it is known what it runs.
"""

from __future__ import annotations

from typing import Final

import sqlalchemy as sa

from fedge_server.registry import schema
from fedge_server.registry.engine import reading, writing

BATCH: Final = 2000  # devices in one transaction: others that write wait for it

_progress, _reports = schema.rollout_devices, schema.rollout_reports
_variants, _devices = schema.variants.c, schema.devices.c


def forget(engine: sa.Engine) -> int:
    """Remove them, in transactions of their own: a kill in between leaves the others for the next time.

    Returns:
        For how many devices and releases something was removed.
    """
    retired = sa.select(_variants.release, _variants.tier).where(_variants.retired.is_not(None))
    with reading(engine) as connection:
        found = [(row.release, row.tier) for row in connection.execute(retired)]
    return sum(_forget(engine, version, tier) for version, tier in found)


def _forget(engine: sa.Engine, version: int, tier: str) -> int:
    progress, newer = _progress.c, _reports.alias()
    of_rollout = progress.rollout_id == f"{tier}-{version}"
    later = sa.exists().where(
        newer.c.device_id == _reports.c.device_id, newer.c.kind == "installed", newer.c.version > version
    )
    reported = (
        sa.select(_reports.c.device_id)
        .join(schema.devices, _devices.id == _reports.c.device_id)
        .where(_reports.c.version == version, _devices.tier == tier, later)
        .distinct()
    )
    return _in_batches(
        engine, sa.select(progress.device_id).where(of_rollout), _progress, of_rollout
    ) + _in_batches(engine, reported, _reports, _reports.c.version == version)


def _in_batches(
    engine: sa.Engine, devices: sa.Select[tuple[str]], table: sa.Table, where: sa.ColumnElement[bool]
) -> int:
    count = 0
    while True:
        with reading(engine) as connection:
            ids = list(connection.scalars(devices.limit(BATCH)))
        if not ids:
            return count
        with writing(engine) as connection:
            connection.execute(table.delete().where(where, table.c.device_id.in_(ids)))
        count += len(ids)
