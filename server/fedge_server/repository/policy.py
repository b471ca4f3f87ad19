"""The rules by which a tier's metadata may be signed: pure, and closed when in doubt.

A repository asks before each signature for a tier, and a signer elsewhere asks again, with what it
remembers itself as `previous`. Whatever cannot be read, or raises, is a reason against.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tuf.api.metadata import Targets
from tuf.api.serialization.json import CanonicalJSONSerializer

from fedge.delivery import MAX_TARGETS_BYTES, Kind, lineage_digest, tier_of
from fedge.errors import FedgeError, FormatError, TrustError
from fedge.golden import Golden
from fedge.manifest import Release, VariantEntry
from fedge.routing import KEY, Routing
from fedge.sealing import FORMAT, Place, key_id, opened, sealed_bytes
from fedge.spec import Spec
from fedge.telemetry.reference import Reference
from fedge_server.repository.content import MAX_KEPT, FileEntry, Offered, TierContent
from fedge_server.repository.signing import Evidence, Request

Policy = Callable[[Request], tuple[str, ...]]
"""Reasons against signing this for a tier; none: it may be signed."""


def reasons_against(request: Request) -> tuple[str, ...]:
    """Why a tier's metadata must not be signed; none: every rule holds.

    The role's version rises. The floor and the newest version are never lowered, and the floor is not above
    the newest. What was offered stays as it was or goes; what is new has a version above all before. Each
    release has a manifest of its version and tier, a gate that let it out within its limits, golden inputs
    and, where it names one, a telemetry reference of its spec, and its lineage. A new sealed model opens to
    the manifest's.
    """
    try:
        tier = tier_of(request.role)
        if tier is None:
            return (f"{request.role[:60]!r} is no role of a tier",)
        after = _read(request.payload)
        before = None if request.previous is None else _read(request.previous)
        if before is not None and after.version <= before.version:
            return (f"version {after.version} of the role is not above {before.version}",)
        old = TierContent.empty(tier) if before is None else TierContent.from_targets(tier, before)
        new = TierContent.from_targets(tier, after)
        return (*_marks(old, new), *_changes(old, new), *_evidence(tier, old, new, request))
    except FedgeError as error:
        return (str(error),)
    except Exception as error:  # noqa: BLE001 - closed: a rule that could not be applied has not been kept
        return (f"the rules could not be applied ({type(error).__name__}: {str(error)[:120]})",)


def _read(payload: bytes) -> Targets:
    """The metadata that these bytes are the only spelling of: what is judged is what is signed."""
    if len(payload) > MAX_TARGETS_BYTES:
        raise FormatError(f"metadata: {len(payload)} bytes, over the {MAX_TARGETS_BYTES} it may have")
    targets = Targets.from_dict(json.loads(payload))
    if CanonicalJSONSerializer().serialize(targets) != payload:
        raise FormatError("metadata: not in canonical form")
    return targets


def _marks(old: TierContent, new: TierContent) -> Iterator[str]:
    before, after = old.mark, new.mark
    if after.floor < before.floor:
        yield f"the floor may not be lowered from {before.floor} to {after.floor}"
    highest = max([before.newest, *new.releases])
    if after.newest != highest:
        yield f"the newest version is {highest}, not {after.newest}"
    if after.floor > max(after.newest, before.floor):
        yield f"a floor of {after.floor} is above the newest version {after.newest}"
    if after.newest > 0 and after.newest not in new.releases:
        yield f"the newest version {after.newest} must stay on offer"
    if below := [version for version in new.releases if version < after.floor]:
        yield f"version {below[0]} is offered below the floor {after.floor}"
    if len(new.releases) > MAX_KEPT:
        yield f"{len(new.releases)} versions are offered, over {MAX_KEPT}"


def _changes(old: TierContent, new: TierContent) -> Iterator[str]:
    for version, offered in new.releases.items():
        if version in old.releases:
            if offered != old.releases[version]:
                yield f"version {version} is signed already, with other content"
        elif version <= old.mark.newest:
            yield f"version {version} is not above {old.mark.newest}, the last that was signed"


def _evidence(tier: str, old: TierContent, new: TierContent, request: Request) -> Iterator[str]:
    for version, offered in new.releases.items():
        evidence = request.evidence.get(version)
        if evidence is None:
            yield f"version {version}: there is no evidence"
            continue
        try:
            yield from (f"version {version}: {why}" for why in _release(tier, version, offered, evidence))
            if offered.note.sealing is not None and version not in old.releases:
                opens = _opens(Place(tier, version), offered, evidence)
                yield from (f"version {version}: {why}" for why in opens)
        except TrustError as error:
            yield f"version {version}: {error}"


def _release(tier: str, version: int, offered: Offered, evidence: Evidence) -> Iterator[str]:
    files, note = offered.files, offered.note
    manifest = FileEntry.of(evidence.manifest)
    if manifest != files["manifest"] or manifest.sha256 != note.manifest:
        yield "the manifest is not the one that is offered"
        return
    release = Release.from_bytes(evidence.manifest)
    if release.version != version:
        yield f"its manifest is of version {release.version}"
    if lineage_digest(release.lineage) != note.lineage:
        yield "its lineage is not the manifest's"
    entry = release.variant(tier)
    if note.sealing is None:
        if files["model"] != FileEntry(entry.wire_bytes, entry.wire_sha256):
            yield "its model is not the manifest's variant of this tier"
    elif note.sealing.format != FORMAT or files["model"].length != sealed_bytes(entry.wire_bytes):
        yield "its sealed model has not the format, or the length, of the manifest's variant of this tier"
    report = FileEntry.of(evidence.report)
    if report != files["report"] or report.sha256 != entry.evidence_sha256:
        yield "the gate's report is not the one that the manifest names"
        return
    yield from _gate(evidence.report)
    given = FileEntry.of(evidence.golden)
    if given != files["golden"] or given.sha256 != entry.golden_sha256:
        yield "its golden inputs are not those that the manifest names"
        return
    Golden.from_bytes(evidence.golden, release.spec)
    yield from _reference(files, entry, evidence, release.spec)
    if KEY in entry.evidence:
        Routing.from_json(entry.evidence[KEY])  # devices decide by it what leaves them


def _reference(
    files: Mapping[Kind, FileEntry], entry: VariantEntry, evidence: Evidence, spec: Spec
) -> Iterator[str]:
    """Devices count by its edges: it must be the one that was made with the release, of its features."""
    if not entry.reference_sha256:
        if "reference" in files or evidence.reference:
            yield "it has a telemetry reference, which the manifest does not name"
        return
    given = FileEntry.of(evidence.reference)
    if files.get("reference") != given or given.sha256 != entry.reference_sha256:
        yield "its telemetry reference is not the one that the manifest names"
        return
    Reference.from_bytes(evidence.reference, spec)


def _opens(place: Place, offered: Offered, evidence: Evidence) -> Iterator[str]:
    """A ciphertext hides what is signed: with the key that is named it must open to what passed the gate."""
    sealed, sealing = evidence.sealed, offered.note.sealing
    if sealed is None or sealing is None:
        yield "its model is sealed, and its ciphertext and content key were not shown"
        return
    if FileEntry.of(sealed.ciphertext) != offered.files["model"]:
        yield "the ciphertext that was shown is not the one that is offered"
        return
    if key_id(sealed.key) != sealing.key:
        yield "the content key that was shown is not the one that is named"
        return
    digest = hashlib.sha256()
    for plain in opened([sealed.ciphertext], sealed.key, place):
        digest.update(plain)
    if digest.hexdigest() != Release.from_bytes(evidence.manifest).variant(place.tier).wire_sha256:
        yield "its sealed model is not the manifest's variant of this tier"


def _gate(report: bytes) -> Iterator[str]:
    """Passed, and by its own figures: a report that says so against them is no evidence."""
    try:
        value: Any = json.loads(report.decode("utf-8"))
    except (ValueError, RecursionError):
        yield "the gate's report is not JSON"
        return
    if not isinstance(value, dict) or value.get("passed") is not True or value.get("reasons") != []:
        reasons = value.get("reasons") if isinstance(value, dict) else None
        yield f"its gate has not passed ({repr(reasons)[:200]})"
        return
    yield from _bounded(value, "drop_upper", "max_drop")
    if value.get("max_class_drop") is not None:
        yield from _bounded(value, "worst_class_drop_upper", "max_class_drop")


def _bounded(report: dict[str, Any], figure: str, limit: str) -> Iterator[str]:
    found, most = report.get(figure), report.get(limit)
    values = [float(v) for v in (found, most) if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(values) != 2 or not all(map(math.isfinite, values)) or values[0] > values[1]:
        yield f"its gate passed with {figure} = {repr(found)[:30]}, of {limit} = {repr(most)[:30]}"
