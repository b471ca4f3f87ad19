"""Publish a draft for each tier that can be signed now; the others wait, with a word on what is missing.

The draft is in the database before anything is signed. Killed in between, the same call goes on: a release
that is in the repository already, and not written down, is recognised by its content.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Final

import sqlalchemy as sa

from fedge.delivery import tier_of
from fedge.errors import AbsentError, FedgeError, RefusedError, SignerAwayError, TrustError, UserError
from fedge.files import sole_holder
from fedge.manifest import Release, VariantEntry
from fedge_server.registry.database import Registry
from fedge_server.registry.drafts import VERSION, Draft, Status, mark
from fedge_server.registry.engine import writing
from fedge_server.registry.living import when
from fedge_server.release.beginning import Begin, beginning
from fedge_server.release.lineage import release_of, removed, why_removed
from fedge_server.release.place import ONLINE, AtHand, ReleasePlace
from fedge_server.repository import RoleKeys
from fedge_server.rollout.audit import append
from fedge_server.rollout.service import Rollouts

PATIENCE_S: Final = 120.0  # for another publisher, and the signers that it asks
PUBLISHER: Final = "publisher"  # who, in the audit trail, unless a person asked


@dataclass(frozen=True, slots=True)
class Waiting:
    """A tier that was not published."""

    tier: str
    why: str
    is_refused: bool = False  # a signer has said no; else none could be asked


@dataclass(frozen=True, slots=True)
class Published:
    """What became of a draft."""

    draft: str
    release: Release | None  # of the tiers that were published now; None: none was
    waiting: tuple[Waiting, ...]

    def lines(self, home: object) -> list[str]:
        """For people."""
        said = []
        if self.release is not None:
            tiers = ", ".join(entry.tier for entry in self.release.variants)
            said.append(f"release {self.release.version} published in {home} (tiers: {tiers})")
        for each in self.waiting:
            word = "refused" if each.is_refused else "awaiting signature"
            said.append(f"tier {each.tier}: {word}: {each.why}")
        if self.waiting:
            said.append(f"draft {self.draft} is kept: fedge-server release publish {self.draft}")
        return said


def publish_draft(
    place: ReleasePlace,
    registry: Registry,
    draft_id: str,
    *,
    who: str = PUBLISHER,
    is_floor: bool = False,
) -> Published:
    """Publish a draft for all its tiers that are not published and can be signed.

    Args:
        place: of the repository and the keys.
        registry: that holds the draft.
        draft_id: which.
        who: asks for it, for the audit trail.
        is_floor: whether devices of its tiers may run nothing below it any more: a way back, which no
            rollout of its own follows.

    Raises:
        UserError: there is no such draft, its bytes are not kept any more, or the plan in the settings cannot
            be used.
        FedgeError: the repository or the disk refuses, or another process publishes; nothing was published.
    """
    # One that was refused may be retired while signers are asked: its bytes stay until a release names them.
    with _alone(place), registry.store.adding():
        return _publish_alone(place, registry, draft_id, who, is_floor)


def _publish_alone(
    place: ReleasePlace, registry: Registry, draft_id: str, who: str, is_floor: bool
) -> Published:
    draft = registry.drafts.get(draft_id)
    begin: Begin = (lambda _, __: None) if is_floor else beginning(place, registry)
    if (done := _finished(place, registry, draft, who, begin)) is not None:
        draft = registry.drafts.get(draft_id)
        if not draft.open:
            return Published(draft_id, done, ())
    gone = [each.retired for each in draft.variants if each.retired is not None]
    if gone and not draft.open:
        raise UserError(
            f"draft {draft.id}: was refused, and its bytes were removed {when(max(gone))}; make its variants "
            f"again: fedge-server compress --run {draft.release.lineage.run}"
        )
    at_hand, waiting = _prepared(place, draft)
    release = None
    left = [tier for tier in draft.open if tier not in {each.tier for each in waiting}]
    while left and release is None:
        try:
            release = _publish(place, registry, draft, left, at_hand, is_floor)
        except (RefusedError, SignerAwayError) as error:
            tier = tier_of(error.role)
            if tier not in left:
                raise
            left.remove(tier)
            waiting.append(Waiting(tier, str(error), isinstance(error, RefusedError)))
    if release is not None:
        _record(registry, draft, release, who, begin)
    _set_aside(registry, draft.id, waiting, who)
    return Published(draft_id, release, tuple(waiting))


def draft_again(registry: Registry, version: int, tiers: Sequence[str] | None = None) -> str:
    """A draft with the content of a release: a fleet is taken back by publishing it under a higher version.

    Args:
        registry: that holds the release.
        version: its version.
        tiers: of its variants; None: all.

    Raises:
        UserError: there is no such release, it has no variant for a tier, or its bytes are not kept any more.
    """
    release = release_of(registry, version)
    try:
        entries = release.variants if tiers is None else tuple(release.variant(tier) for tier in tiers)
    except TrustError as error:
        raise UserError(str(error)) from error
    moment = datetime.now(UTC)
    while True:  # until nothing of this very second is published: a draft is told by its content
        created = moment.strftime("%Y-%m-%dT%H:%M:%SZ")
        try:
            name = registry.drafts.add(replace(release, version=VERSION, created=created, variants=entries))
        except AbsentError as error:
            asked = {entry.tier for entry in entries}
            gone = {t: since for t, since in removed(registry, version).items() if t in asked}
            raise UserError(f"release {version}: {why_removed(gone) if gone else error}") from error
        if registry.drafts.get(name).open:
            return name
        moment += timedelta(seconds=1)


def postpone(registry: Registry, draft_id: str, why: str, *, who: str = PUBLISHER) -> Published:
    """Let a draft wait that could not be published for a reason that has nothing to do with its tiers."""
    waiting = tuple(Waiting(tier, why) for tier in registry.drafts.get(draft_id).open)
    _set_aside(registry, draft_id, waiting, who)
    return Published(draft_id, None, waiting)


@contextmanager
def _alone(place: ReleasePlace) -> Iterator[None]:
    """One process at a time publishes drafts of a home: two would publish the same one twice."""
    try:
        with sole_holder(place.home / "publishing.lock", patience_s=PATIENCE_S):
            yield
    except BlockingIOError as error:
        raise FedgeError(f"{place.home}: another process publishes a draft; try again later") from error


def _publish(
    place: ReleasePlace,
    registry: Registry,
    draft: Draft,
    tiers: Sequence[str],
    at_hand: AtHand,
    is_floor: bool,
) -> Release:
    content = _part(draft.release, tiers)
    objects = [registry.store.get(digest) for entry in content.variants for digest in _objects(entry)]
    return place.repository.publish(
        lambda version: replace(content, version=version),
        objects,
        at_hand.of(*tiers),
        is_floor=is_floor,
        needed=_in_rollouts(registry),
    )


def _in_rollouts(registry: Registry) -> dict[str, set[int]]:
    """Versions that devices may be told to install, by tier: metadata must go on listing them."""
    rollouts = Rollouts(registry)
    newest = rollouts.newest()
    return {state.tier: {state.version, rollouts.channel(state.tier).base} for state in newest}


def _part(release: Release, tiers: Sequence[str]) -> Release:
    return replace(release, variants=tuple(entry for entry in release.variants if entry.tier in tiers))


def _objects(entry: VariantEntry) -> list[str]:
    named = (entry.wire_sha256, entry.evidence_sha256, entry.golden_sha256, entry.reference_sha256)
    return [digest for digest in named if digest]


def _prepared(place: ReleasePlace, draft: Draft) -> tuple[AtHand, list[Waiting]]:
    """The keys at hand, once the repository has all tiers that it can have; and the tiers that must wait."""
    if not place.is_server:
        place.make(draft.open)
    if not place.repository.is_there:
        why = "there is no repository yet; make it with: fedge-server keys make"
        return AtHand({}, {}), [Waiting(tier, why) for tier in draft.open]
    at_hand, known = place.at_hand(), place.tiers()
    waiting = []
    for tier in draft.open:
        why = _why_not(place, at_hand, known, tier)
        if not why and tier not in known:
            keys = RoleKeys(tuple(key.key for key in at_hand.tiers[tier]))
            try:
                place.repository.add_tier(tier, keys, at_hand.of(tier))
            except (RefusedError, SignerAwayError) as error:
                why = str(error)
        if why:
            waiting.append(Waiting(tier, why))
    return at_hand, waiting


def _why_not(
    place: ReleasePlace, at_hand: AtHand, known: dict[str, tuple[tuple[str, ...], int]], tier: str
) -> str:
    """Why a tier cannot be signed now, and what to do; empty: it can."""
    if missing := [role for role in ONLINE if role not in at_hand.top]:
        return f"the online key {place.keys / missing[0]}.key is not here, or others can read it"
    held = {key.key.keyid for key in at_hand.tiers.get(tier, ())}
    away = f" ({'; '.join(at_hand.away)})" if at_hand.away else ""
    if not held and tier in known and known[tier][0]:
        names = ", ".join(key[:8] for key in known[tier][0])
        if away:  # it comes back: no reason to replace a key
            return f"{'; '.join(at_hand.away)}; the tier's keys: {names}"
        return f"it has {place.elsewhere(tier, known[tier][0])}"
    if not held:
        return (
            f"no key keys/tier-{tier}.key and no signer{away}; run: fedge-server signer serve, and name its "
            f"socket in [delivery] signers; or fedge-server keys make --tier {tier}"
        )
    if tier not in known:
        if "targets" in at_hand.top:
            return ""
        return (
            f"the repository has no tier {tier!r}, and keys/targets.key, which adds it, is not here; "
            f"run: fedge-server keys add-tier {tier}"
        )
    ids, threshold = known[tier]
    if not ids:
        return f"tier {tier!r} is suspended; run: fedge-server keys rotate tier-{tier}"
    if len(held & set(ids)) < threshold:
        return f"{len(held & set(ids))} of the {threshold} keys that must sign are at hand{away}"
    return ""


def _finished(
    place: ReleasePlace, registry: Registry, draft: Draft, who: str, begin: Begin
) -> Release | None:
    """Write down the release of this draft that a killed publisher has left in the repository, if any."""
    written = {row["version"] for row in registry.releases()}
    if not place.repository.is_there:
        return None
    known = place.tiers()
    for tier in draft.open:
        if tier not in known:
            continue
        for version, manifest in place.repository.manifests(tier).items():
            found = Release.from_bytes(manifest)
            tiers = [entry.tier for entry in found.variants]
            same = replace(found, version=draft.release.version) == _part(draft.release, tiers)
            if version not in written and same:
                _record(registry, draft, found, who, begin)
                return found
    return None


def _record(registry: Registry, draft: Draft, release: Release, who: str, begin: Begin) -> None:
    def further(connection: sa.Connection) -> None:
        for entry in release.variants:
            mark(connection, draft.id, entry.tier, "published", release=release.version)
        tiers = ", ".join(entry.tier for entry in release.variants)
        append(
            connection,
            at=time.time(),
            who=who,
            what="signed and published",
            subject=f"release {release.version}",
            why=f"draft {draft.id}, tiers {tiers}, global model {release.lineage.global_model}",
        )
        begin(connection, release)

    registry.record_release(
        version=release.version,
        run_id=release.lineage.run,
        round_number=release.lineage.round,
        global_model=release.lineage.global_model,
        manifest=release.to_bytes(),
        variants=[
            {
                "tier": entry.tier,
                "recipe": entry.recipe,
                "wire": entry.wire_sha256,
                "installed": entry.installed_sha256,
                "evidence": entry.evidence_sha256,
                "golden": entry.golden_sha256,
                "reference": entry.reference_sha256,
            }
            for entry in release.variants
        ],
        further=further,
    )


def _set_aside(registry: Registry, draft_id: str, waiting: Sequence[Waiting], who: str) -> None:
    """Keep why tiers were not published; a refusal goes into the audit trail."""
    with writing(registry.engine) as connection:
        for each in waiting:
            status: Status = "refused" if each.is_refused else "waiting"
            mark(connection, draft_id, each.tier, status, reason=each.why)
            if each.is_refused:
                append(
                    connection,
                    at=time.time(),
                    who=who,
                    what="signature refused",
                    subject=f"draft {draft_id}",
                    why=f"tier {each.tier}: {each.why}",
                )
