"""From verified metadata to what a device of a tier installs: mark, notes, manifest, variant, trial.

The metadata of a tier says which versions there are and below which none may run (`fedge.delivery`); the
manifest says what a version is; the variant is what travels. Each is held to the one before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from fedge.artefact import unpack
from fedge.delivery import MAX_MARK_BYTES, Kind, ReleaseNote, Sealing, TierMark, mark_path, target_path
from fedge.errors import DigestError, DowngradeError, FormatError, TrustError, UnlistedError
from fedge.files import sha256
from fedge.golden import MAX_BYTES as MAX_GOLDEN_BYTES
from fedge.golden import Golden
from fedge.manifest import MAX_BYTES, Release, VariantEntry
from fedge.telemetry.reference import MAX_BYTES as MAX_REFERENCE_BYTES
from fedge_client.updater.installer import Artefact
from fedge_client.updater.sealed import check_sealing
from fedge_client.updater.streams import DEFAULT_PACE, Fetcher, Pace, whole
from fedge_client.updater.trust import Target, Trusted

_BESIDE: Final[tuple[Kind, ...]] = ("model", "golden")  # what a device fetches besides the manifest


@dataclass(frozen=True, slots=True)
class Offered:
    """A version for a tier, and what to install for it."""

    release: Release
    artefact: Artefact
    golden: Target  # inputs, and what the variant answered to them where it was gated
    reference: Target | None = None  # of telemetry; None: the version has none
    sealing: Sealing | None = None  # how the model travels; None: as the manifest describes it


def mark_of(trusted: Trusted, tier: str) -> TierMark:
    """What holds for a tier: its floor, which the device keeps, and its newest version.

    Raises:
        UnlistedError: metadata says nothing of the tier.
        TrustError: it says something else than fedge writes.
        FetchError: its metadata cannot be fetched now.
    """
    target = trusted.target(mark_path(tier))
    if target is None:
        raise UnlistedError(f"tier {tier!r}: metadata says nothing of it; ask who publishes for its state")
    mark = TierMark.from_json(target.custom)
    if mark.tier != tier or mark.floor > mark.newest or target.length > MAX_MARK_BYTES:
        raise FormatError(
            f"{target.path}: speaks of tier {mark.tier!r}, floor {mark.floor}, newest {mark.newest}"
        )
    return mark


def offer(
    trusted: Trusted, fetch: Fetcher, tier: str, version: int | None = None, *, pace: Pace = DEFAULT_PACE
) -> Offered | None:
    """What a device of a tier is offered; None: the tier has no version yet.

    Args:
        trusted: this poll's metadata.
        fetch: gets targets by their names in the repository.
        tier: of this device.
        version: the one that it was told to take, as a rollout in stages does; None: the newest.
        pace: how slow a stream may be.

    Raises:
        DowngradeError: the version is below the tier's floor.
        TrustError: metadata, manifest and variant do not agree, or do not list the version.
        FetchError: something cannot be fetched now.
    """
    mark = mark_of(trusted, tier)
    version = mark.newest if version is None else version
    if version == 0:
        return None
    if version < mark.floor:
        raise DowngradeError(
            f"version {version} is below the floor {mark.floor} of tier {tier!r}; take a newer one"
        )
    manifest, note = _listed(trusted, target_path(tier, version, "manifest"), version)
    model, golden = (_beside(trusted, tier, note, kind) for kind in _BESIDE)
    if note.manifest != manifest.sha256 or manifest.length > MAX_BYTES:
        raise DigestError(f"{manifest.path}: is another manifest than its metadata says; publish it again")
    data = _signed(manifest, fetch, pace)
    release = Release.from_bytes(data)
    entry = release.variant(tier)
    sealing = note.sealing
    if sealing is not None:
        check_sealing(sealing, entry, model.length)
    described = sealing is not None or (entry.wire_sha256, entry.wire_bytes) == (model.sha256, model.length)
    if release.version != version or not described:
        raise DigestError(f"{manifest.path}: speaks of another variant than {model.path}; publish it again")
    if entry.golden_sha256 != golden.sha256 or golden.length > MAX_GOLDEN_BYTES:
        raise DigestError(f"{manifest.path}: speaks of another trial than {golden.path}; publish it again")
    artefact = _artefact(model, entry, data, release.version, mark)
    return Offered(release, artefact, golden, _reference(trusted, tier, note, entry), sealing)


def golden_of(offered: Offered, fetch: Fetcher, *, pace: Pace = DEFAULT_PACE) -> Golden:
    """What a version is tried with on the device.

    Raises:
        TrustError: other bytes than were signed, or another form than this fedge reads.
        FetchError: it cannot be fetched now.
    """
    return Golden.from_bytes(_signed(offered.golden, fetch, pace), offered.release.spec)


def reference_of(offered: Offered, fetch: Fetcher, *, pace: Pace = DEFAULT_PACE) -> bytes:
    """What a version's telemetry counts by, as it was signed; empty: it has none.

    Raises:
        TrustError: other bytes than were signed.
        FetchError: it cannot be fetched now.
    """
    target = offered.reference
    return b"" if target is None else _signed(target, fetch, pace)


def unpacked(data: bytes, artefact: Artefact) -> bytes:
    """The `Expand` of fedge's variants.

    Raises:
        FormatError: truncated, damaged, or another length than declared.
    """
    return unpack(data, artefact.installed_bytes or 0)


def _signed(target: Target, fetch: Fetcher, pace: Pace) -> bytes:
    data = whole(fetch, target.file, target.length, pace=pace)
    if sha256(data) != target.sha256:
        raise DigestError(f"{target.path}: the bytes fetched are not those that were signed")
    return data


def _reference(trusted: Trusted, tier: str, note: ReleaseNote, entry: VariantEntry) -> Target | None:
    if not entry.reference_sha256:
        return None
    target = _beside(trusted, tier, note, "reference")
    if entry.reference_sha256 != target.sha256 or target.length > MAX_REFERENCE_BYTES:
        raise DigestError(f"{target.path}: is another reference than the manifest names; publish it again")
    return target


def _beside(trusted: Trusted, tier: str, note: ReleaseNote, kind: Kind) -> Target:
    target, other = _listed(trusted, target_path(tier, note.version, kind), note.version)
    if other != note:
        raise DigestError(f"{target.path}: belongs to another manifest than the version's; publish it again")
    return target


def _listed(trusted: Trusted, path: str, version: int) -> tuple[Target, ReleaseNote]:
    target = trusted.target(path)
    if target is None:
        raise TrustError(f"{path}: metadata does not list it; the version may have been withdrawn")
    note = ReleaseNote.from_json(target.custom)
    if note.version != version:
        raise FormatError(f"{path}: its metadata says version {note.version}")
    return target, note


def _artefact(model: Target, entry: VariantEntry, manifest: bytes, version: int, mark: TierMark) -> Artefact:
    return Artefact(
        name=model.file,
        version=version,
        length=model.length,
        sha256=model.sha256,
        floor=mark.floor,
        channel=mark.tier,
        installed_bytes=entry.installed_bytes,
        installed_sha256=entry.installed_sha256,
        notes=manifest,
    )
