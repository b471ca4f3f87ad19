"""What each step of a cycle does in the world, and what has come of it: look, and do what is not done yet.

Each look begins with what is there, under names that the cycle alone has: its run is `NAME-CYCLE`, its draft
is the run's, its rollouts are those of the versions under which that was published. So whoever was killed
between two of them goes on, and nothing is done twice.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import sqlalchemy as sa

from fedge.errors import ConfigError, FedgeError, UserError
from fedge.files import write_atomically
from fedge_server.continual.deciding import RULE
from fedge_server.continual.learnings import Learning
from fedge_server.continual.state import Drift, Ended, Event, Released, Signed, Status, TimePassed
from fedge_server.hub.home import Home
from fedge_server.registry import schema
from fedge_server.registry.database import Registry
from fedge_server.registry.drafts import Draft
from fedge_server.registry.engine import reading
from fedge_server.rollout import fleet, records
from fedge_server.rollout import state as rollout
from fedge_server.rollout.service import Rollouts
from fedge_server.telemetry.store import Telemetry

FIRST_S, MOST_S = 60.0, 3600.0  # between two tries to have a draft signed: less and less often
_GONE: Final = {
    rollout.Status.SUPERSEDED: "a newer release took its place",
    rollout.Status.HALTED: "halted",
    rollout.Status.ROLLING_BACK: "halted, and rolling back",
    rollout.Status.ROLLED_BACK: "rolled back",
}

Publish = Callable[[str], None]
"""Publishes a draft as far as it can be signed now; raises FedgeError where it cannot be tried at all."""


@dataclass(frozen=True, slots=True)
class World:
    """All that steps look at and act on."""

    home: Home
    registry: Registry
    publish: Publish
    queued: Callable[[], None] = lambda: (
        None
    )  # called when a run was queued: whoever starts workers must look
    clock: Callable[[], float] = time.time  # Unix seconds
    tries: dict[str, tuple[float, float]] = field(
        default_factory=dict
    )  # by draft: the next, the pause after it

    @property
    def rollouts(self) -> Rollouts:
        """Of the registry."""
        return Rollouts(self.registry, self.clock)


def look(world: World, learning: Learning) -> Event:
    """Do what the state asks for, and say what has come of it.

    Raises:
        FedgeError: the database or the disk refuses; the same look later goes on.
    """
    return _STEPS[learning.state.status](world, learning)


def versions(engine: sa.Engine, tiers: tuple[str, ...]) -> dict[str, int]:
    """By tier, the release that its devices have: what its rollouts came to, else its newest one."""
    variants, found = schema.variants.c, {}
    with reading(engine) as connection:
        for tier in tiers:
            newest = sa.select(sa.func.max(variants.release)).where(variants.tier == tier)
            version = records.read_channel(connection, tier).base or connection.scalar(newest)
            if version:
                found[tier] = int(version)
    return found


def alike(engine: sa.Engine, tier: str, version: int) -> list[int]:
    """Releases that install what this one does: a way back brings old content under a new version."""
    with reading(engine) as connection:
        content = fleet.content(connection, version, tier)
        variants = schema.variants.c
        same = sa.select(variants.release).where(variants.tier == tier, variants.installed == content)
        return sorted(connection.scalars(same))


def _watch(world: World, learning: Learning) -> Event:
    """Alarms of drift under what devices have; the newest release of those under which one stands.

    Where a rollout went back, devices have old content under a new version, which is watched anew: what
    drifted before it is a part of its baselines, so the alarm that stands under the old version still counts.
    """
    engine = world.registry.engine
    telemetry, there = Telemetry(engine), versions(engine, learning.tiers)
    raised = [
        each
        for tier, version in there.items()
        for each in alike(engine, tier, version)
        if telemetry.watch(tier, each).alarm is not None
    ]
    return Drift(stands=bool(raised), release=max(raised, default=0))


def _run(world: World, learning: Learning) -> Event:
    """Queue the cycle's run, and wait until its rounds are over.

    While a way back awaits its signature no rollout may begin, and what would come of the run would be for
    nothing: the run waits for it.
    """
    run = world.registry.run(learning.run_id)
    cycle = learning.state.cycle
    if run is None:
        if any(each.tier in learning.tiers and _goes_back(each) for each in world.rollouts.newest()):
            return TimePassed()
        try:
            _queue(world, learning)
        except ConfigError as error:
            return Ended(cycle, Status.RUNNING, failed=str(error))
        return TimePassed()
    over = run["status"] == "done" or world.home.run_model(learning.run_id).exists()
    failed = _failed(run)
    return Ended(cycle, Status.RUNNING, failed=failed) if over or failed else TimePassed()


def _queue(world: World, learning: Learning) -> None:
    there = versions(world.registry.engine, learning.tiers)
    config = learning.terms.config(learning.config, max(there.values(), default=0))
    text = json.dumps(config, indent=2).encode()
    write_atomically(world.home.run(learning.run_id) / "config.json", text + b"\n")
    world.registry.queue_run(learning.run_id, task=config["task"], seed=config["seed"], config=config)
    world.queued()


def _compress(world: World, learning: Learning) -> Event:
    """The run's own process compresses, gates and drafts; it is done when it has published what it could."""
    run = world.registry.run(learning.run_id)
    if run is None or run["status"] not in ("done", "failed", "stopped"):
        return TimePassed()
    failed = _failed(run)
    if not failed and _draft(world, learning) is None:
        failed = f"no tier has a variant that passed its gate; see: fedge-server run log {learning.run_id}"
    return Ended(learning.state.cycle, Status.COMPRESSING, failed=failed)


def _release(world: World, learning: Learning) -> Event:
    """What is signed already, and what waits."""
    draft = _draft(world, learning)
    if draft is None:
        return Ended(
            learning.state.cycle, Status.RELEASING, failed=f"run {learning.run_id}: its draft is gone"
        )
    published, waiting = _published(draft), _waiting(draft)
    if not published and not waiting:
        return Ended(learning.state.cycle, Status.RELEASING, failed=_refused(draft))
    return Released(learning.state.cycle, max(published.values(), default=0), signed=not waiting)


def _await_signature(world: World, learning: Learning) -> Event:
    """Try again now and then; tiers that are signed do not wait for the others."""
    draft = _draft(world, learning)
    cycle = learning.state.cycle
    if draft is None:
        return Ended(cycle, Status.AWAITING_SIGNATURE, failed=f"run {learning.run_id}: its draft is gone")
    due, pause = world.tries.get(draft.id, (0.0, FIRST_S))
    if _waiting(draft) and world.clock() >= due:
        world.tries[draft.id] = world.clock() + pause, min(2 * pause, MOST_S)
        world.publish(draft.id)
        draft = world.registry.drafts.get(draft.id)
    published = _published(draft)
    if failed := _begin_rollouts(world, learning, published):
        return Ended(cycle, Status.AWAITING_SIGNATURE, failed=failed)
    if _waiting(draft):
        return TimePassed()
    if not published:
        return Ended(cycle, Status.AWAITING_SIGNATURE, failed=_refused(draft))
    return Signed(cycle, max(published.values()))


def _roll_out(world: World, learning: Learning) -> Event:
    """Begin the rollout of each tier, and wait until all are over."""
    draft = _draft(world, learning)
    published = _published(draft) if draft else {}
    cycle = learning.state.cycle
    if failed := _begin_rollouts(world, learning, published):
        return Ended(cycle, Status.ROLLING_OUT, failed=failed)
    states = [world.rollouts.get(f"{tier}-{version}") for tier, version in published.items()]
    if any(state.due is not None and world.clock() >= state.due for state in states):
        world.rollouts.tick()  # devices that ask let time pass too, if any ask
        return TimePassed()
    bad = [
        f"rollout {each.id}: {_GONE[each.status]} ({each.reason})" for each in states if each.status in _GONE
    ]
    bad += [f"rollout {each.id}: its way back is ordered" for each in states if _goes_back(each)]
    if bad:
        return Ended(cycle, Status.ROLLING_OUT, failed="; ".join(bad))
    done = all(state.status is rollout.Status.DONE for state in states)
    return Ended(cycle, Status.ROLLING_OUT) if done else TimePassed()


def _goes_back(state: rollout.State) -> bool:
    return state.going_back and state.status not in _GONE


def _begin_rollouts(world: World, learning: Learning, published: Mapping[str, int]) -> str:
    """Begin those that are not there; why one cannot begin, empty: all are there."""
    known = {state.id for state in world.rollouts.all()}
    for tier, version in published.items():
        if f"{tier}-{version}" in known:
            continue
        why = f"cycle {learning.state.cycle} of learning {learning.name}"
        try:
            world.rollouts.start(version, tier, learning.terms.plan, who=RULE, why=why)
        except UserError as error:  # such as a way back that awaits its signature
            return f"rollout {tier}-{version}: cannot begin ({error})"
    return ""


def _draft(world: World, learning: Learning) -> Draft | None:
    """The first that the cycle's run has made: later ones are a person's doing."""
    return next(iter(world.registry.drafts.of_run(learning.run_id)), None)


def _published(draft: Draft) -> dict[str, int]:
    return {each.tier: each.release for each in draft.variants if each.release is not None}


def _waiting(draft: Draft) -> list[str]:
    return [each.tier for each in draft.variants if each.status == "waiting"]


def _refused(draft: Draft) -> str:
    return "; ".join(f"tier {each.tier}: refused: {each.reason}" for each in draft.variants)


def _failed(run: Mapping[str, Any]) -> str:
    over = run["status"] in ("failed", "stopped")
    return f"run {run['id']}: {run['status']} ({run['reason']})" if over else ""


_STEPS: Final[dict[Status, Callable[[World, Learning], Event]]] = {
    Status.WATCHING: _watch,
    Status.RUNNING: _run,
    Status.COMPRESSING: _compress,
    Status.RELEASING: _release,
    Status.AWAITING_SIGNATURE: _await_signature,
    Status.ROLLING_OUT: _roll_out,
}


def publisher(home: Home, registry: Registry) -> Publish:
    """Publish with the keys and signers of a home; loads what publishes when there is something to do."""

    def publish(draft: str) -> None:
        from fedge_server.release.place import ReleasePlace
        from fedge_server.release.publishing import postpone, publish_draft

        try:
            publish_draft(ReleasePlace.of(home.root), registry, draft, who=RULE)
        except FedgeError as error:
            postpone(registry, draft, str(error), who=RULE)

    return publish
