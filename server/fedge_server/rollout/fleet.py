"""What a rollout needs of the registry: a release's variant for a tier, and devices for each stage."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import sqlalchemy as sa

from fedge.errors import UserError
from fedge_server.registry import schema
from fedge_server.registry.devices import ACTIVE
from fedge_server.rollout.assignment import stage_of
from fedge_server.rollout.plan import Plan, default_criteria, default_stages
from fedge_server.rollout.state import State

_releases, _variants, _runs = schema.releases, schema.variants, schema.runs


def check_variant(connection: sa.Connection, version: int, tier: str) -> None:
    """Refuse a release that is not there, or that has nothing for a tier.

    Raises:
        UserError: it says what there is.
    """
    if version not in _versions(connection, version):
        raise UserError(f"release {version}: there is none; list them with: fedge-server release ls")
    if content(connection, version, tier) is None:
        found = connection.scalars(sa.select(_variants.c.tier).where(_variants.c.release == version))
        raise UserError(
            f"release {version}: holds nothing for tier {tier!r}; tiers: {', '.join(sorted(found))}"
        )


def tiers_of(connection: sa.Connection, version: int) -> list[str]:
    """The tiers that a release has variants for."""
    query = sa.select(_variants.c.tier).where(_variants.c.release == version).order_by(_variants.c.tier)
    return list(connection.scalars(query))


def content(connection: sa.Connection, version: int, tier: str) -> str | None:
    """SHA-256 of what a release installs on a tier's devices."""
    where = (_variants.c.release == version, _variants.c.tier == tier)
    found = connection.scalar(sa.select(_variants.c.installed).where(*where))
    return None if found is None else str(found)


def is_retired(connection: sa.Connection, version: int, tier: str) -> bool:
    """Whether the bytes of a release's variant are not kept any more."""
    where = (_variants.c.release == version, _variants.c.tier == tier)
    return connection.scalar(sa.select(_variants.c.retired).where(*where)) is not None


def check_kept(connection: sa.Connection, version: int, tier: str) -> None:
    """Refuse a release whose bytes are not kept any more: no way back would lead to it later.

    Raises:
        UserError: they are not.
    """
    if is_retired(connection, version, tier):
        raise UserError(
            f"release {version}: its bytes for tier {tier} are not kept any more; roll out a newer one"
        )


def check_same_content(connection: sa.Connection, rollout: State, version: int) -> None:
    """Refuse a replacement that does not bring the old content back.

    Raises:
        UserError: the release is not there, or holds other content.
    """
    check_variant(connection, version, rollout.tier)
    old, new = (content(connection, each, rollout.tier) for each in (rollout.base, version))
    if old != new:
        raise UserError(
            f"release {version}: installs {str(new)[:16]} on tier {rollout.tier}, but release {rollout.base} "
            f"installed {str(old)[:16]}; a rollback publishes the old content anew"
        )


def fitted(connection: sa.Connection, plan: Plan | None, rollout_id: str, version: int, tier: str) -> Plan:
    """A plan that the tier's devices can fulfil: the given one, or one made for them.

    Raises:
        UserError: a stage waits for more installs than it has devices, or names one that is not of the tier.
    """
    devices = active(connection, tier)
    if plan is None:
        return default_plan(rollout_id, devices, max_latency_ms(connection, version, tier))
    named = {device for stage in plan.stages for device in stage.devices}
    if unknown := sorted(named - set(devices)):
        raise UserError(f"plan: device {unknown[0]!r} is no active device of tier {tier!r}; give whole ids")
    if plan.only_tags:  # which devices have them is known once they connect
        return plan
    counts, tagged = devices_by_stage(plan, rollout_id, devices), False
    for stage, there in zip(plan.stages, counts, strict=True):
        tagged = tagged or bool(stage.tags)
        if there < stage.min_installs and not tagged:
            raise UserError(
                f"stage {stage.name!r}: waits for {stage.min_installs} installs, but holds {there} of the "
                f"{len(devices)} devices of tier {tier!r}; raise percent or lower min_installs"
            )
    return plan


def default_plan(rollout_id: str, devices: list[str], max_ms: float | None = None) -> Plan:
    """A twentieth, a quarter, all, where they hold more devices each time; half of them must have it."""
    plan = Plan(default_stages(), default_criteria(max_ms))
    counts, stages, before = devices_by_stage(plan, rollout_id, devices), [], 0
    for stage, there in zip(plan.stages, counts, strict=True):
        if there > before or stage.percent == 100:
            stages.append(replace(stage, min_installs=max(1, math.ceil(there / 2))))
            before = there
    return replace(plan, stages=tuple(stages))


def devices_by_stage(plan: Plan, rollout_id: str, devices: list[str]) -> list[int]:
    """How many devices each stage holds with those before it; those that tags would add are left out."""
    stages = [stage_of(replace(plan, only_tags=frozenset()), rollout_id, device) for device in devices]
    return [
        sum(stage is not None and stage <= number for stage in stages) for number in range(len(plan.stages))
    ]


def active(connection: sa.Connection, tier: str) -> list[str]:
    """Ids of a tier's active devices."""
    table = schema.devices
    return list(
        connection.scalars(sa.select(table.c.id).where(table.c.tier == tier, table.c.status == ACTIVE))
    )


def max_latency_ms(connection: sa.Connection, version: int, tier: str) -> float | None:
    """The tier's latency budget as the release's run was configured; None: there is none."""
    query = sa.select(_runs.c.config).join(_releases, _releases.c.run_id == _runs.c.id)
    config: Any = connection.scalar(query.where(_releases.c.version == version)) or {}
    found = config.get("tiers", {}).get(tier, {}).get("max_latency_ms")
    return float(found) if isinstance(found, int | float) and found > 0 else None


def _versions(connection: sa.Connection, version: int) -> set[int]:
    if not 0 < version < 2**31:  # PostgreSQL refuses to look up what its integer does not hold
        return set()
    return set(connection.scalars(sa.select(_releases.c.version).where(_releases.c.version == version)))
