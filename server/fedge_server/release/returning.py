"""The way back of halted rollouts, without a hand on it: old content signed anew, and floors that follow.

A rollout that was halted wants the content of the release before under a new version. This publishes it, if
it can be signed now, as the tier's floor, and tells the rollout. Where that floor is not signed, as after a
way back that a person has published, it is raised.
Each step looks at what is there, so that whoever was killed between two of them goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from fedge.errors import FedgeError, RefusedError, SignerAwayError, UserError
from fedge_server.registry.database import Registry
from fedge_server.release.lineage import release_of, released
from fedge_server.release.place import ReleasePlace
from fedge_server.release.publishing import draft_again, publish_draft
from fedge_server.rollout.service import Clock, Rollouts, wanted_content
from fedge_server.rollout.state import State

ROLLOUT = "rollout"  # who, in the audit trail

Mark = Callable[[str], tuple[int, int]]
"""The signed floor and the newest version of a tier, as it is published; (0, 0): there is none."""


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that was done, or why it could not be done now."""

    what: str
    is_done: bool


def take_back(place: ReleasePlace, registry: Registry, mark: Mark, clock: Clock = time.time) -> list[Step]:
    """Do what rollouts want done about signed releases; nothing where they want nothing.

    Args:
        place: of the repository and the keys.
        registry: of rollouts and releases.
        mark: of tiers, as published.
        clock: of rollouts.
    """
    rollouts = Rollouts(registry, clock)
    steps = []
    for state in rollouts.newest():
        try:
            if (wanted := wanted_content(state)) is not None:
                steps.append(_replaced(place, registry, rollouts, state, wanted))
            if (raised := _floor(place, rollouts, state.tier, mark)) is not None:
                steps.append(raised)
        except FedgeError as error:
            steps.append(Step(f"rollout {state.id}: cannot go on ({error})", is_done=False))
    return steps


def _replaced(place: ReleasePlace, registry: Registry, rollouts: Rollouts, state: State, wanted: int) -> Step:
    """Publish the old content above the bad version, unless that was done, and say so to the rollout."""
    version = _there(registry, state, wanted)
    if version is None:
        draft = _draft(registry, state.tier, wanted)
        done = publish_draft(place, registry, draft, who=ROLLOUT, is_floor=True)
        if done.release is None:
            why = "; ".join(each.why for each in done.waiting)
            return Step(
                f"rollout {state.id}: the content of release {wanted} awaits its signature: {why}", False
            )
        version = done.release.version
    rollouts.replaced(state.id, version, who=ROLLOUT)
    return Step(f"rollout {state.id}: release {version} brings the content of {wanted} back", is_done=True)


def _there(registry: Registry, state: State, wanted: int) -> int | None:
    """A release above the bad one with the wanted content, such as one whose publisher was killed since."""
    content = release_of(registry, wanted).variant(state.tier).installed_sha256
    for release in released(registry):
        brings = {entry.tier: entry.installed_sha256 for entry in release.variants}
        if release.version > state.version and brings.get(state.tier) == content:
            return release.version
    return None


def _draft(registry: Registry, tier: str, wanted: int) -> str:
    """The draft of this content that waits already, or a new one: asking again must not leave one more."""
    release = release_of(registry, wanted)
    variants = (release.variant(tier),)
    for draft in registry.drafts.all(unpublished=True):
        if draft.release.variants == variants and draft.release.lineage == release.lineage:
            return draft.id
    return draft_again(registry, wanted, [tier])


def _floor(place: ReleasePlace, rollouts: Rollouts, tier: str, mark: Mark) -> Step | None:
    """Sign the floor that the rollouts of a tier have raised; None: it is signed."""
    wanted = rollouts.channel(tier).floor
    signed, newest = mark(tier)
    if not signed < wanted <= newest:
        return None
    try:
        place.repository.raise_floor(tier, wanted, place.at_hand().of(tier))
    except (RefusedError, SignerAwayError, UserError) as error:
        return Step(f"tier {tier}: its floor {wanted} awaits its signature ({error})", is_done=False)
    return Step(f"tier {tier}: its floor is {wanted} now", is_done=True)
