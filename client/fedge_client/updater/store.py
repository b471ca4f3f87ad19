"""What is installed on a device, and which slot of it counts: one small file, replaced as a whole.

    current              which slot runs, which one was committed before, floors, quarantine
    slots/a, slots/b     artefact: the installed bytes; notes: what was signed about them
    parts/<sha256>       what has come of a download so far

`current` is the one commit point. Everything else is written, and made durable, before it. To open what is
installed nothing is written, so a full disk does not matter.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Final, Literal

from fedge.artefact import MAX_INSTALLED_BYTES
from fedge.errors import (
    DigestError,
    FedgeError,
    ForbiddenError,
    FormatError,
    HealthError,
    TrustError,
    UserError,
)
from fedge.files import read_bounded, sha256, sole_holder, write_atomically
from fedge.manifest import MAX_VERSION

Slot = Literal["a", "b"]

SCHEMA: Final = 1
ARTEFACT, NOTES = "artefact", "notes"
MAX_NOTES_BYTES: Final = 8 * 1024**2
MAX_CHANNEL_CHARS: Final = 64
MAX_QUARANTINED: Final = 64  # the oldest is forgotten first
MAX_TRIALS: Final = (
    5  # begun and never ended, of one artefact: the process or the device died of it each time
)
_MAX_STATE_BYTES: Final = 64 * 1024
_BLOCK: Final = 1024 * 1024
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Record:
    """What a slot holds since it was committed."""

    slot: Slot
    version: int  # >= 1
    digest: str  # SHA-256 of the artefact as it was signed
    installed_sha256: str  # of the file in the slot, which quarantine knows it by
    installed_bytes: int
    notes_sha256: str  # of what is kept beside it
    notes_bytes: int
    channel: str = ""  # that its version counts in; empty: in whichever is followed

    def __post_init__(self) -> None:
        """Refuse nonsense on construction."""
        numbers = all(type(n) is int for n in (self.version, self.installed_bytes, self.notes_bytes))
        if self.slot not in ("a", "b") or not numbers or not 1 <= self.version <= MAX_VERSION:
            raise FormatError(f"current: slot {self.slot!r} with version {self.version!r}; it is damaged")
        if not all(map(is_digest, (self.digest, self.installed_sha256, self.notes_sha256))):
            raise FormatError(f"current: version {self.version} has no usable digest; it is damaged")
        check_channel(self.channel)
        lengths = (self.installed_bytes, self.notes_bytes)
        if not (0 <= lengths[0] <= MAX_INSTALLED_BYTES and 0 <= lengths[1] <= MAX_NOTES_BYTES):
            raise FormatError(f"current: version {self.version} has {lengths} bytes; it is damaged")


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """The committed state of a device."""

    current: Record | None = None
    previous: Record | None = (
        None  # committed before `current`, in the other slot: the one place to return to
    )
    floor: int = 0  # by signed metadata; what runs is never below it
    announced: int = 0  # a floor that signed metadata asks for, above what runs: reached by the next commit
    left: int = 0  # a local return left this version: it is not offered again; 0: none
    quarantined: tuple[str, ...] = ()  # contents that failed their trial here, by digest, oldest first
    trial: str = ""  # content whose trial has begun and not ended; empty: none
    trials: int = 0  # how often it has begun
    channel: str = ""  # that is followed, whose floor and numbers these are; empty: there is only one

    def __post_init__(self) -> None:
        """Refuse nonsense on construction."""
        numbers = (self.floor, self.announced, self.left, self.trials)
        if not all(type(number) is int and 0 <= number <= MAX_VERSION for number in numbers):
            raise FormatError(f"current: numbers {numbers} are out of range; it is damaged")
        check_channel(self.channel)
        if self.counted is not None and self.counted.version < self.floor:
            raise FormatError(
                f"current: version {self.counted.version} is below floor {self.floor}; it is damaged"
            )
        if self.previous is not None and (self.current is None or self.previous.slot == self.current.slot):
            raise FormatError("current: two versions in one slot; it is damaged")
        digests = (*self.quarantined, *([self.trial] if self.trial else []))
        if len(self.quarantined) > MAX_QUARANTINED or not all(map(is_digest, digests)):
            raise FormatError("current: its quarantine is damaged")

    @property
    def lowest(self) -> int:
        """No version below this is installed or returned to."""
        return max(self.floor, self.announced)

    @property
    def counted(self) -> Record | None:
        """What runs, where its version can be compared with others: it is of the channel that is followed."""
        return self.current if self.current is not None and self._counts(self.current) else None

    def _counts(self, record: Record) -> bool:
        return record.channel in ("", self.channel)

    def may_run(self, record: Record) -> bool:
        """Whether an installed version is not below the floor, which says nothing of other channels."""
        return not self._counts(record) or record.version >= self.lowest

    def in_channel(self, channel: str) -> State:
        """Follow a channel: another one's floor, and what was left of it, do not count in this one."""
        if channel == self.channel or not self.channel:
            return replace(self, channel=channel)
        return replace(self, channel=channel, floor=0, announced=0, left=0)

    def following(self, channel: str) -> State:
        """This state, for what is of a channel.

        Raises:
            ForbiddenError: another one is followed: the device was moved while this was fetched.
        """
        if channel and self.channel not in ("", channel):
            raise ForbiddenError(
                f"this device follows {self.channel!r} by now, and {channel!r} no longer; ask again"
            )
        return self.in_channel(channel or self.channel)

    @property
    def free_slot(self) -> Slot:
        """The slot that does not run."""
        return "b" if self.current is not None and self.current.slot == "a" else "a"

    def with_floor(self, floor: int) -> State:
        """Raise the floor; where what runs is below it, with the next commit."""
        if self.counted is not None and floor > self.counted.version:
            return replace(self, announced=max(self.announced, floor))
        return replace(self, floor=max(self.floor, floor))

    def with_quarantined(self, digest: str) -> State:
        """An artefact is not tried again."""
        others = tuple(known for known in self.quarantined if known != digest)
        return replace(self, quarantined=(*others, digest)[-MAX_QUARANTINED:], trial="", trials=0)

    def with_trial(self, digest: str) -> State:
        """The trial of an artefact begins."""
        return replace(self, trial=digest, trials=self.trials + 1 if digest == self.trial else 1)

    def without_trial(self) -> State:
        """It has ended: whatever kills the device afterwards is no fault of the artefact."""
        return replace(self, trial="", trials=0)

    def committed(self, record: Record, *, kept: Record | None) -> State:
        """`record` runs from now on; `kept` is what the other slot holds."""
        return replace(self, current=record, previous=kept, floor=self.lowest, announced=0, left=0)

    def returned(self) -> tuple[Record, State]:
        """The version committed before, and the state in which it runs again.

        Raises:
            UserError: there is none, or it is below the floor.
        """
        back, now = self.previous, self.current
        if back is None or now is None:
            raise UserError("there is no previous version to return to; install another one")
        if not self.may_run(back):
            raise UserError(
                f"the previous version {back.version} is below this device's floor {self.lowest}; "
                "install a newer one"
            )
        left = now.version if self._counts(now) else self.left
        return back, replace(self, current=back, previous=None, left=left)

    def to_bytes(self) -> bytes:
        """The file's content."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, sort_keys=True).encode() + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes) -> State:
        """Read the file's content.

        Raises:
            FormatError: damaged, or written by another version of fedge.
        """
        try:
            value: Any = json.loads(data.decode("utf-8"))
            value.setdefault("channel", "")  # absent before there were any
            if value.pop("schema") != SCHEMA or value.keys() != {item.name for item in fields(cls)}:
                raise FormatError("current: damaged, or written by another version of fedge")
            for name in ("current", "previous"):
                value[name] = None if value[name] is None else Record(**value[name])
            return cls(**{**value, "quarantined": tuple(value["quarantined"])})
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise FormatError(f"current: damaged ({type(error).__name__}); make the device anew") from error


@dataclass(frozen=True, slots=True)
class Opened:
    """An installed version, whole and checked."""

    record: Record
    data: bytes
    notes: bytes  # what was signed about it, as it was given to the installer
    returned: bool  # the current slot is damaged, and this is the version committed before


class Store:
    """The folder of a device's installed versions."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def state(self) -> State:
        """The committed state; an empty one before the first commit.

        Raises:
            FormatError: the file is damaged.
        """
        path = self.home / "current"
        return State.from_bytes(read_bounded(path, _MAX_STATE_BYTES)) if path.exists() else State()

    def commit(self, state: State) -> None:
        """Replace the committed state, unless it is the same."""
        if state != self.state():
            write_atomically(self.home / "current", state.to_bytes())

    def file(self, slot: Slot, name: str = ARTEFACT) -> Path:
        """Where a file of a slot lies."""
        return self.home / "slots" / slot / name

    def clear(self, slot: Slot) -> None:
        """Give back the space of a slot that does not run."""
        shutil.rmtree(self.file(slot).parent, ignore_errors=True)

    def read(self, record: Record) -> tuple[bytes, bytes]:
        """The artefact and the notes of a slot, checked.

        Raises:
            FormatError: a file is absent, or longer than it was.
            DigestError: the disk gives other bytes than were installed.
        """
        data = _read(self.file(record.slot), record.installed_bytes, record.installed_sha256)
        return data, _read(self.file(record.slot, NOTES), record.notes_bytes, record.notes_sha256)

    def is_whole(self, record: Record | None) -> bool:
        """Whether a slot still holds what was committed."""
        try:
            return record is not None and self.read(record) is not None
        except TrustError:
            return False

    def open(self) -> Opened:
        """What is installed; the version before it where the current slot is damaged. Writes nothing.

        An installation may flip the slots meanwhile; then the new current one is read.

        Raises:
            UserError: nothing is installed.
            TrustError: what is installed is damaged, and there is nothing to return to.
        """
        while True:
            state = self.state()
            if state.current is None:
                raise UserError(f"nothing is installed at {self.home}; install a version first")
            try:
                return Opened(state.current, *self.read(state.current), returned=False)
            except TrustError:
                if self.state() != state:
                    continue
                if state.previous is None or not state.may_run(state.previous):
                    raise
                return Opened(state.previous, *self.read(state.previous), returned=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Only one process at a time changes what is installed; a disk that refuses is said so.

        Raises:
            FedgeError: another one does so now, or the disk is full or refuses a write.
        """
        try:
            self.home.mkdir(parents=True, exist_ok=True)
            with sole_holder(self.home / ".lock"):
                for path in (*self.home.glob(".current.*"), *self.home.glob("slots/*/.*")):
                    path.unlink(missing_ok=True)  # half-written by a process that was killed
                yield
        except BlockingIOError as error:
            raise FedgeError(f"{self.home}: another installation is under way; try again later") from error
        except OSError as error:
            raise FedgeError(
                f"{self.home}: the disk refuses it ({error.strerror or error}); make room, "
                "what was installed goes on working"
            ) from error


def _read(path: Path, length: int, digest: str) -> bytes:
    data = read_bounded(path, length)
    if sha256(data) != digest:
        raise DigestError(f"{path}: not the bytes that were installed; install it again")
    return data


def refuse_quarantined(state: State, digest: str, version: int) -> None:
    """A version that failed its trial here is not tried again.

    Raises:
        HealthError: it is one.
    """
    if digest in state.quarantined:
        raise HealthError(
            f"version {version}: failed its trial on this device before and is in quarantine; publish another"
        )


def check_channel(channel: str) -> None:
    """Refuse what is no channel's name.

    Raises:
        FormatError: it is too long, or no text.
    """
    if not isinstance(channel, str) or len(channel) > MAX_CHANNEL_CHARS:
        raise FormatError(f"channel {str(channel)[:80]!r}: a name has {MAX_CHANNEL_CHARS} characters at most")


def is_digest(value: object) -> bool:
    """Whether a value is a SHA-256 in lower-case hexadecimal digits."""
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def digest_of(path: Path) -> str:
    """SHA-256 of a file that may be large."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Make a file survive a power cut."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
