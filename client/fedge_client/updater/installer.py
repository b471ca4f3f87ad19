"""Install an artefact that verified metadata names, so that a kill at any moment is harmless.

The order is what makes it safe: space, download into a part named by its digest (taken up again where it
broke off), digest of the whole, the slot that does not run, its trial, and then one rename commits.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedge.artefact import MAX_INSTALLED_BYTES
from fedge.errors import (
    AbsentError,
    DigestError,
    DowngradeError,
    FedgeError,
    FetchError,
    ForbiddenError,
    FormatError,
    HealthError,
    SlowError,
    TrustError,
)
from fedge.files import sha256, sync_folder, write_atomically
from fedge.manifest import MAX_VERSION
from fedge_client.updater.health import Check
from fedge_client.updater.store import (
    MAX_NOTES_BYTES,
    MAX_TRIALS,
    NOTES,
    Opened,
    Record,
    Slot,
    State,
    Store,
    check_channel,
    digest_of,
    is_digest,
    refuse_quarantined,
    sync,
)
from fedge_client.updater.streams import DEFAULT_PACE, Fetcher, Pace, Seconds, chunks_of

Expand = Callable[[bytes, "Artefact"], bytes]
"""Make the installed bytes from those that travelled: unpack or open them."""

Patch = Callable[[Opened, "Artefact"], bytes | None]
"""Make the installed bytes from what runs, by a way that is shorter than the whole; None: there is none."""

_SPARE_BYTES: Final = 256 * 1024  # file system overhead of an installation
_FRUITLESS: Final = 4  # attempts in a row that bring no byte
_BYTES_PER_ATTEMPT: Final = 64 * 1024  # who sends less each time is not waited for forever


@dataclass(frozen=True, slots=True, kw_only=True)
class Artefact:
    """What verified metadata says of a file to install."""

    name: str  # what the fetcher is asked for
    version: int  # >= 1
    length: int  # bytes on the network
    sha256: str  # of the bytes on the network
    floor: int = 0  # lowest version that the metadata lets run
    channel: str = ""  # that versions are counted in; those of two channels are in no order
    installed_bytes: int | None = None  # after `Expand`; None: it is installed as it travels
    installed_sha256: str | None = None
    notes: bytes = b""  # verified, to be kept beside it: its manifest, so that it can be opened

    @property
    def content(self) -> str:
        """What a trial is a trial of: SHA-256 of the installed bytes, whatever form they travel in."""
        return self.installed_sha256 or self.sha256

    def __post_init__(self) -> None:
        """Refuse nonsense on construction."""
        if not 1 <= self.version <= MAX_VERSION or not 0 <= self.floor <= self.version:
            raise FormatError(
                f"{self.name}: version {self.version} with floor {self.floor}; a version is 1 or more, "
                "and not below its floor"
            )
        check_channel(self.channel)
        lengths = (self.length, self.length if self.installed_bytes is None else self.installed_bytes)
        if not all(1 <= length <= MAX_INSTALLED_BYTES for length in lengths):
            raise FormatError(f"{self.name}: lengths {lengths} must be 1 to {MAX_INSTALLED_BYTES} bytes")
        if len(self.notes) > MAX_NOTES_BYTES:
            raise FormatError(f"{self.name}: {len(self.notes)} bytes of notes; {MAX_NOTES_BYTES} at most")
        if (self.installed_bytes is None) != (self.installed_sha256 is None):
            raise FormatError(f"{self.name}: length and digest of what is installed go together")
        if not all(is_digest(value) for value in (self.sha256, self.installed_sha256 or self.sha256)):
            raise FormatError(f"{self.name}: {self.sha256[:80]!r} is no SHA-256 in hexadecimal digits")


def decide(state: State, offered: Artefact, *, whole: bool, again: bool = False) -> bool:
    """Whether to install what verified metadata offers.

    Args:
        state: what is committed.
        offered: the artefact.
        whole: whether the current slot still holds what was committed; a damaged one is installed anew.
        again: take back a version that a local return left.

    Raises:
        DowngradeError: it is older than what runs, or below the floor.
        HealthError: it failed its trial here before.
        TrustError: it has the version of what runs but other content.
    """
    counted = state.counted
    if offered.version < state.lowest:
        raise DowngradeError(
            f"version {offered.version} is below this device's floor {state.lowest}; publish a newer one"
        )
    if counted is not None and offered.version < counted.version:
        raise DowngradeError(
            f"version {offered.version} is older than the installed {counted.version}; "
            "to go back a fleet, publish the old content under a higher version"
        )
    refuse_quarantined(state, offered.content, offered.version)
    if state.current is None:
        return True
    if counted is not None and offered.version == counted.version:
        if offered.sha256 != counted.digest:
            raise TrustError(
                f"version {offered.version} is installed with other content; it must not be signed twice"
            )
        return not whole
    return again or offered.version > state.left


class Installer:
    """One device's installed artefact, and how it changes."""

    def __init__(
        self,
        home: Path,
        fetch: Fetcher,
        check: Check,
        *,
        expand: Expand | None = None,
        patch: Patch | None = None,
        pace: Pace = DEFAULT_PACE,
        seconds: Seconds = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        """Nothing is read, written or fetched yet.

        Args:
            home: folder of what is installed; made when it is absent.
            fetch: the transport; it must take up from an offset.
            check: the trial of a version before it is committed.
            expand: makes what is installed from what travels; None: they are the same.
            patch: a shorter way to what is installed, tried before the whole is fetched; only with `expand`.
            pace: how slow a stream may be.
            seconds: the clock of the pace.
            pause: waits so many seconds between attempts that bring nothing.
        """
        self.store = Store(home)
        self._fetch, self._check = fetch, check
        self._expand, self._patch = expand, patch
        self._pace, self._seconds, self._pause = pace, seconds, pause

    def raise_floor(self, floor: int, channel: str = "") -> State:
        """Let nothing below a version be installed any more: from enrolment, or from verified metadata.

        Raises:
            ForbiddenError: the device follows another channel by now.
            FedgeError: the disk refuses it.
        """
        with self.store.locked():
            self.store.commit(self.store.state().following(channel).with_floor(floor))
            return self.store.state()

    def install(self, offered: Artefact, *, again: bool = False) -> State:
        """Install an artefact unless it runs already; returns what is committed afterwards.

        Whatever fails, what was installed goes on working, and what has come of a download is kept for the
        next attempt.

        Args:
            offered: from verified metadata.
            again: take back a version that a local return left.

        Raises:
            HealthError: it does not pass its trial, now or before; it is not tried again.
            TrustError: it is refused; the message says which check failed.
            FetchError: it cannot be fetched now, or comes too slowly (SlowError); or the device follows
                another channel by now (ForbiddenError).
            FedgeError: the disk is full or refuses a write.
        """
        if (self._expand is None) != (offered.installed_bytes is None):
            raise FormatError(f"{offered.name}: travels in another form than this installer takes")
        with self.store.locked():
            state = self.store.state().following(offered.channel).with_floor(offered.floor)
            self.store.commit(state)  # signed, whatever becomes of the artefact
            whole = self.store.is_whole(state.current)
            if not decide(state, offered, whole=whole, again=again):
                return state
            damaged = state.current if not whole else None
            slot = state.free_slot if damaged is None else damaged.slot  # what is whole is not touched
            self._drop_other_parts(offered)
            self._make_room(slot, offered)
            data = self._patched(state, offered) if whole else None
            if data is None:
                data = self._expanded(offered, self._downloaded(offered))
            state = self._tried(state, offered, data)
            self._fill(slot, offered, data)
            record = _record(slot, offered, data)
            kept = state.current if whole else state.previous
            state = state.committed(record, kept=kept)
            self.store.commit(state)
            self._part(offered).unlink(missing_ok=True)
            return state

    def return_to_previous(self) -> State:
        """Go back to the version committed before, which the other slot holds; floors stay.

        Raises:
            UserError: there is none, or it is below the floor.
            TrustError: it is damaged, or does not pass its trial.
            FedgeError: the disk refuses it.
        """
        with self.store.locked():
            back, state = self.store.state().returned()
            self._check(self.store.read(back)[0])
            self.store.commit(state)
            return state

    def reject_current(self) -> State:
        """What runs turned out bad after it was committed: put it in quarantine, go back if there is a way.

        Raises:
            UserError: there is nothing to return to, or it is below the floor; it is in quarantine none the
                less.
            FedgeError: the disk refuses it.
        """
        with self.store.locked():
            state = self.store.state()
            if state.current is not None:
                state = state.with_quarantined(state.current.installed_sha256)
                self.store.commit(state)
            back, state = state.returned()
            self.store.read(back)
            self.store.commit(state)
            return state

    def _part(self, offered: Artefact) -> Path:
        return self.store.home / "parts" / offered.sha256

    def _drop_other_parts(self, offered: Artefact) -> None:
        """Only the newest download is taken up again: old parts would fill the disk."""
        folder = self.store.home / "parts"
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.name != offered.sha256:
                path.unlink()

    def _make_room(self, slot: Slot, offered: Artefact) -> None:
        """Before anything is fetched; what the slot held is given up only where it must be."""
        part = self._part(offered)
        have = part.stat().st_size if part.exists() else 0
        installed = (offered.installed_bytes or 0) + len(offered.notes)
        needed = max(offered.length - have, 0) + installed + _SPARE_BYTES
        free = shutil.disk_usage(self.store.home).free
        if free >= needed:
            return
        other = self.store.file(slot)
        if free + (other.stat().st_size if other.exists() else 0) < needed:
            raise FedgeError(
                f"{self.store.home}: {free} bytes are free, the installation of version {offered.version} "
                f"needs {needed}; make room, what was installed goes on working"
            )
        self.store.clear(slot)

    def _patched(self, state: State, offered: Artefact) -> bytes | None:
        """The installed bytes by the shorter way, with the digest that was signed; None: fetch the whole."""
        if self._patch is None or state.current is None or offered.installed_sha256 is None:
            return None
        if self._part(offered).exists():  # a download that has begun goes on
            return None
        data = self._patch(Opened(state.current, *self.store.read(state.current), returned=False), offered)
        return data if data is not None and sha256(data) == offered.installed_sha256 else None

    def _downloaded(self, offered: Artefact) -> Path:
        """The whole part, with the digest that was signed, durable."""
        part = self._part(offered)
        part.parent.mkdir(exist_ok=True)
        resumed = part.exists()
        self._complete(offered, part)
        if digest_of(part) == offered.sha256:
            sync(part)
            return part
        part.unlink()
        if resumed:  # the disk or an earlier source may be at fault: once more, from the start
            self._complete(offered, part)
            if digest_of(part) == offered.sha256:
                sync(part)
                return part
            part.unlink()
        raise DigestError(
            f"{offered.name}: the bytes fetched are not those that were signed; fetch from another source"
        )

    def _complete(self, offered: Artefact, part: Path) -> None:
        """Fetch what is missing, in as many attempts as bring something."""
        if part.exists() and part.stat().st_size > offered.length:
            part.unlink()
        fruitless, left = 0, 8 + offered.length // _BYTES_PER_ATTEMPT
        while (have := part.stat().st_size if part.exists() else 0) < offered.length:
            error = self._attempt(offered, part, have)
            left -= 1
            came = part.stat().st_size > have
            fruitless = 0 if came else fruitless + 1
            if fruitless == _FRUITLESS or left <= 0:
                raise error or FetchError(
                    f"{offered.name}: ends after {part.stat().st_size} of {offered.length} bytes; "
                    "try again later"
                )
            if not came:
                self._pause(0.1 * 2**fruitless)

    def _attempt(self, offered: Artefact, part: Path, have: int) -> FetchError | None:
        """Append what comes; the error that broke it off, if it may be different next time."""
        try:
            with part.open("ab") as file:
                for chunk in chunks_of(
                    self._fetch,
                    offered.name,
                    offered.length - have,
                    have,
                    pace=self._pace,
                    seconds=self._seconds,
                ):
                    file.write(chunk)
        except (AbsentError, ForbiddenError, SlowError):  # once more would bring the same
            raise
        except FetchError as error:
            return error
        except FormatError:  # more than was signed: nothing of it is worth keeping
            os.truncate(part, have)
            raise
        return None

    def _expanded(self, offered: Artefact, part: Path) -> bytes:
        data = part.read_bytes()
        if self._expand is None:
            return data
        data = self._expand(data, offered)
        if len(data) != offered.installed_bytes or sha256(data) != offered.installed_sha256:
            part.unlink()
            raise DigestError(f"{offered.name}: unpacks to other bytes than were signed; publish another")
        return data

    def _fill(self, slot: Slot, offered: Artefact, data: bytes) -> None:
        """Put what passed its trial into the slot that does not run, durable."""
        self.store.clear(slot)
        file = self.store.file(slot)
        file.parent.mkdir(parents=True)
        if self._expand is None:
            self._part(offered).replace(file)
        else:
            write_atomically(file, data)
        write_atomically(self.store.file(slot, NOTES), offered.notes)
        for folder in (file.parent, file.parent.parent, self.store.home):
            sync_folder(folder)

    def _tried(self, state: State, offered: Artefact, data: bytes) -> State:
        """The state after a trial that was passed; one that kills the device each time counts as failed."""
        state = state.with_trial(offered.content)
        if state.trials > MAX_TRIALS:
            self._quarantine(state, offered)
            refuse_quarantined(self.store.state(), offered.content, offered.version)
        self.store.commit(state)
        try:
            self._check(data)
        except MemoryError as error:  # it may have more another time
            raise HealthError(
                f"version {offered.version}: this device has not the memory to try it; "
                "what was installed goes on working"
            ) from error
        except TrustError as error:
            self._quarantine(state, offered)
            raise HealthError(
                f"version {offered.version}: failed its trial ({error}); what was installed goes on working"
            ) from error
        state = state.without_trial()
        self.store.commit(state)
        return state

    def _quarantine(self, state: State, offered: Artefact) -> None:
        self.store.commit(state.with_quarantined(offered.content))
        self._part(offered).unlink(missing_ok=True)


def _record(slot: Slot, offered: Artefact, data: bytes) -> Record:
    notes = offered.notes
    made = sha256(data), len(data), sha256(notes), len(notes)
    return Record(slot, offered.version, offered.sha256, *made, offered.channel)
