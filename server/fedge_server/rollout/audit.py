"""Who did what, when and why: entries that are only ever added, each bound to all before it by its digest.

The digest of an entry is the SHA-256 of its canonical JSON (sorted keys, no spaces, UTF-8), which holds the
digest of the entry before. So `verify` finds an entry that was changed, removed, added or moved. Entries cut
off at the end, and a trail that was written anew as a whole, are found by an anchor alone: number and digest
of an entry, kept where whoever can write the database cannot.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

import sqlalchemy as sa

from fedge.canonical import canonical
from fedge.errors import UserError
from fedge.files import sha256
from fedge_server.registry import schema
from fedge_server.registry.engine import reading

GENESIS: Final = "0" * 64  # what the first entry names as the one before
MAX_WHY: Final = 2000  # characters
_MAX_NAME: Final = 255  # characters of who, what and subject
_BATCH: Final = 1000  # rows in memory

_audit = schema.audit


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry; its fields are what the digest covers."""

    number: int  # from 1, without a gap
    at_ms: int  # Unix milliseconds; never before the entry before
    who: str
    what: str
    subject: str  # what it was done to
    why: str
    previous: str  # digest of the entry before

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON."""
        return sha256(canonical(asdict(self), "audit"))


@dataclass(frozen=True, slots=True)
class Anchor:
    """An entry's number and digest as somebody has written them down."""

    number: int
    digest: str

    @classmethod
    def parse(cls, text: str) -> Anchor:
        """From NUMBER:DIGEST.

        Raises:
            UserError: it is not written so.
        """
        number, _, digest = text.partition(":")
        if not (number.isascii() and number.isdigit() and int(number) > 0) or len(digest) != 64:
            raise UserError(
                f"anchor {text[:100]!r}: must be NUMBER:DIGEST, as fedge-server audit verify prints it"
            )
        return cls(int(number), digest)

    def __str__(self) -> str:
        return f"{self.number}:{self.digest}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What `verify` found."""

    entries: int  # that hold, from the first one
    head: Anchor | None  # the last of these
    broken: int | None = None  # number of the first entry that does not hold
    why: str = ""  # it does not


class Audit:
    """The trail of a database."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    def entries(self, subject: str | None = None, last: int | None = None) -> list[Entry]:
        """Entries, oldest first.

        Args:
            subject: about this alone.
            last: so many of the newest.
        """
        query = sa.select(_audit).order_by(_audit.c.number.desc())
        if subject is not None:
            query = query.where(_audit.c.subject == subject)
        if last is not None:
            query = query.limit(last)
        with reading(self._engine) as connection:
            return [_entry(row) for row in connection.execute(query).mappings()][::-1]

    def verify(self, anchor: Anchor | None = None) -> Verdict:
        """Recompute the chain from its first entry on.

        Args:
            anchor: that the trail must still hold.
        """
        head, number = None, 0
        for row in self._rows():
            entry, before = _entry(row), head.digest if head else GENESIS
            if why := _fault(entry, row["digest"], number + 1, before, anchor):
                return Verdict(number, head, number + 1, why)
            number, head = entry.number, Anchor(entry.number, entry.digest)
        if anchor is not None and number < anchor.number:
            return Verdict(
                number, head, number + 1, f"entries up to {anchor.number} were there once, and are gone"
            )
        return Verdict(number, head)

    def _rows(self) -> Iterator[Mapping[str, Any]]:
        """All rows in their order, a batch at a time."""
        after = -1
        while True:
            query = sa.select(_audit).where(_audit.c.number > after).order_by(_audit.c.number).limit(_BATCH)
            with reading(self._engine) as connection:
                rows = [dict(row) for row in connection.execute(query).mappings()]
            yield from rows
            if len(rows) < _BATCH:
                return
            after = rows[-1]["number"]


def append(connection: sa.Connection, *, at: float, who: str, what: str, subject: str, why: str) -> Entry:
    """Add an entry within the transaction of the change that it records; writers take turns.

    Args:
        connection: of `writing`.
        at: Unix seconds; a clock that was set back stands still in the trail.
        who: a person, or the rule that acted by itself.
        what: was done, in a word or two.
        subject: it was done to.
        why: in the words of `who`.
    """
    query = sa.select(_audit).order_by(_audit.c.number.desc()).limit(1)
    last = connection.execute(query).mappings().first()
    entry = Entry(
        number=last["number"] + 1 if last else 1,
        at_ms=max(int(at * 1000), last["at_ms"] if last else 0),
        who=_bounded(who, _MAX_NAME),
        what=_bounded(what, _MAX_NAME),
        subject=_bounded(subject, _MAX_NAME),
        why=_bounded(why, MAX_WHY),
        previous=last["digest"] if last else GENESIS,
    )
    connection.execute(_audit.insert().values(**asdict(entry), digest=entry.digest))
    return entry


def _entry(row: Mapping[Any, Any]) -> Entry:
    return Entry(**{name: row[name] for name in Entry.__slots__})


def _fault(entry: Entry, digest: str, number: int, before: str, anchor: Anchor | None) -> str:
    """Why an entry does not hold; empty when it does."""
    if entry.number != number:
        return f"it is missing: the next one is {entry.number}"
    if entry.previous != before:
        return "it does not follow the entry before it"
    if entry.digest != digest:
        return "it was changed: its digest is not that of its content"
    if anchor is not None and anchor.number == number and anchor.digest != digest:
        return f"it is not the one of the anchor, whose digest is {anchor.digest}"
    return ""


def _bounded(text: str, length: int) -> str:
    """As both databases hold it: without NUL, lone surrogates, and no longer than its column."""
    return text.replace("\0", "").encode("utf-8", "replace").decode()[:length]
