"""One poll of a device: what may it run now, and is that installed? Over any transport."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedge.errors import AbsentError, UserError
from fedge.manifest import Release
from fedge_client.device import INSTALLED, Device
from fedge_client.updater.health import Check, anything, model_check
from fedge_client.updater.installer import Expand, Installer, Patch, decide
from fedge_client.updater.patching import patching
from fedge_client.updater.releases import Offered, golden_of, mark_of, offer, reference_of, unpacked
from fedge_client.updater.streams import DEFAULT_PACE, Fetcher, Pace, within
from fedge_client.updater.trust import Clock, Trust, utc_now

if TYPE_CHECKING:
    from fedge_client.updater.store import State


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a poll has led to."""

    state: State  # committed afterwards
    offered: Offered | None  # None: the tier has no version yet
    changed: bool  # whether it was installed by this poll


def install(
    device: Device,
    fetch: Fetcher,
    *,
    told: int | None = None,
    again: bool = False,
    clock: Clock = utc_now,
    pace: Pace = DEFAULT_PACE,
) -> Outcome:
    """Install what a device is offered, unless it runs already. Whatever fails, what ran runs on.

    Args:
        device: whose.
        fetch: gets files of the repository: `metadata/...`, `targets/...`.
        told: the version to take, as a rollout in stages says; None: the newest of the tier.
        again: take back a version that a local return left.
        clock: the time that dates of expiry are compared with.
        pace: how slow a stream may be.

    Raises:
        HealthError: it does not pass its trial here, now or before.
        TrustError: it is refused; the message says which check failed.
        FetchError: it cannot be fetched now.
        FedgeError: the disk is full or refuses a write.
    """
    targets = within("targets", fetch)
    trusted = device.trust(fetch, clock=clock, pace=pace).refresh()
    _installer(device, targets, anything, pace).raise_floor(mark_of(trusted, device.tier).floor, device.tier)
    offered, before = offer(trusted, targets, device.tier, told, pace=pace), device.store.state()
    if offered is None or not decide(
        before, offered.artefact, whole=device.store.is_whole(before.current), again=again
    ):
        return Outcome(before, offered, changed=False)
    # Before the trial is counted: an outage is no failure of the version.
    check = model_check(offered.release.spec, golden_of(offered, targets, pace=pace))
    device.keep_reference(reference_of(offered, targets, pace=pace))
    expand, patch = _ways(device, offered, fetch, pace)
    state = _installer(device, targets, check, pace, expand, patch).install(offered.artefact, again=again)
    return Outcome(state, offered, changed=True)


def refresh(device: Device, fetch: Fetcher, *, clock: Clock = utc_now, pace: Pace = DEFAULT_PACE) -> None:
    """Follow the repository's metadata and keep the tier's floor; install nothing.

    Raises:
        TrustError, FetchError, FedgeError: as `install`.
    """
    trusted = device.trust(fetch, clock=clock, pace=pace).refresh()
    floor = mark_of(trusted, device.tier).floor
    _installer(device, within("targets", fetch), anything, pace).raise_floor(floor, device.tier)


def look(tier: str, root: bytes, fetch: Fetcher, *, clock: Clock = utc_now) -> Offered | None:
    """What a device would be offered; leaves nothing behind, so it can be asked before there is one.

    Raises:
        TrustError: it would be refused.
        FetchError: something cannot be fetched now.
    """
    with tempfile.TemporaryDirectory(prefix="fedge-") as scratch:
        trusted = Trust(Path(scratch), root, within("metadata", fetch), clock=clock).refresh()
        return offer(trusted, within("targets", fetch), tier)


def return_to_previous(device: Device) -> Release:
    """Go back to the release committed before, which is kept on the device. No network is needed.

    Raises:
        UserError: there is none, or it is below the floor.
        TrustError: it is damaged, or does not pass its trial.
        FedgeError: the disk refuses it.
    """
    state = device.store.state()
    back = device.previous(state)
    if back is None:
        state.returned()  # says why, where that is not the disk's fault
        raise UserError("the previous version is damaged on the disk; install another one")
    _installer(device, _nowhere, model_check(back.spec), DEFAULT_PACE).return_to_previous()
    return back


def reject_current(device: Device) -> None:
    """What runs turned out bad: put it in quarantine, and go back if there is a way.

    Raises:
        UserError: there is nothing to return to; it is in quarantine none the less.
        FedgeError: the disk refuses it.
    """
    _installer(device, _nowhere, anything, DEFAULT_PACE).reject_current()


def _ways(device: Device, offered: Offered, fetch: Fetcher, pace: Pace) -> tuple[Expand, Patch]:
    """What makes the installed bytes of the whole, and of a delta: opened first where they are sealed."""
    sealing, tier, version = offered.sealing, device.tier, offered.release.version
    if sealing is None:
        return unpacked, patching(fetch, tier, pace=pace)
    from fedge.sealing import DELTA, Place, unseal
    from fedge_client.agent.identity import Identity, is_enrolled
    from fedge_client.updater.sealed import content_keys, unsealed

    if not is_enrolled(device.home):
        raise UserError(
            f"release {version} is sealed for enrolled devices; "
            "run: fedge-client enroll JOIN, or publish with [delivery] seal = false"
        )
    identity = Identity.open(device.home)
    keys = content_keys(fetch, tier, identity.device_id, identity.keys.sealing, pace=pace)

    def opened(made: bytes) -> bytes:
        return unseal(made, keys(version, sealing.key), Place(tier, version, DELTA))

    expand = unsealed(sealing, offered.release.variant(tier), keys)
    return expand, patching(fetch, tier, opened, pace=pace)


def _installer(
    device: Device,
    targets: Fetcher,
    check: Check,
    pace: Pace,
    expand: Expand = unpacked,
    patch: Patch | None = None,
) -> Installer:
    return Installer(device.home / INSTALLED, targets, check, expand=expand, patch=patch, pace=pace)


def _nowhere(name: str, maximum: int, offset: int = 0, /) -> Iterator[bytes]:
    raise AbsentError(f"{name}: a return reads nothing from elsewhere")
