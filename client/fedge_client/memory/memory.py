"""The memory on disk: one SQLite file, in which a kill, a full disk or a power cut leave no half of anything.

What is kept never leaves the device: training reads it there. Nothing is kept before consent is given; when
it is withdrawn everything is forgotten. What is forgotten is overwritten with zeros in the file
(`secure_delete`) and the log beside it is emptied; what a flash disk's own spare blocks still hold nobody
can promise.
"""

from __future__ import annotations

import hashlib
import random
import secrets
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fedge.canonical import canonical
from fedge.dataset import Examples
from fedge.errors import DataError, FedgeError, FormatError, UserError
from fedge.spec import Spec
from fedge_client.memory.reservoir import Below, balanced, uniform

MAX_SIZE: Final = 20_000  # examples
_PAGE: Final = 4096
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS about (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS examples (
    place INTEGER PRIMARY KEY, label INTEGER NOT NULL, given INTEGER NOT NULL, at REAL NOT NULL,
    x BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS classes (
    label INTEGER PRIMARY KEY, seen INTEGER NOT NULL, full INTEGER NOT NULL);
"""
# Who is gone was not seen: else what comes next would hardly be kept.
_FORGOTTEN: Final = """
UPDATE classes SET full = 0,
    seen = min(seen, (SELECT count(*) FROM examples WHERE examples.label = classes.label))
    WHERE ? IS NULL OR label = ?
"""


@dataclass(frozen=True, slots=True)
class Settings:
    """How much is kept, and what.

    Raises:
        UserError: a number is out of range.
    """

    size: int = 500  # examples at most
    max_bytes: int = 64 * 1024**2  # of the file
    balanced: bool = True  # classes get equal room
    least_confidence: float | None = None  # of an answer that is kept as a label; None: only given labels are

    def __post_init__(self) -> None:
        """Refuse nonsense on construction."""
        if not 1 <= self.size <= MAX_SIZE:
            raise UserError(f"memory: size = {self.size}: must be 1 to {MAX_SIZE}")
        if not 64 * 1024 <= self.max_bytes <= 2**40:
            raise UserError(f"memory: max_bytes = {self.max_bytes}: must be {64 * 1024} or more")
        if self.least_confidence is not None and not 0 < self.least_confidence <= 1:
            raise UserError(
                f"memory: least_confidence = {self.least_confidence:g}: must be above 0, at most 1"
            )


class Memory:
    """Examples with labels; safe to use from several threads, and by one process at a time.

    Args:
        folder: its own; made when absent.
        spec: of the model that learns from it.
        settings: of what is kept.

    Raises:
        FedgeError: the file cannot be opened.
        UserError: it holds examples of another model.
    """

    def __init__(self, folder: Path, spec: Spec, settings: Settings | None = None) -> None:
        self._path, self._spec, self._settings = folder / "memory.db", spec, settings or Settings()
        self._lock = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._open()
        except (OSError, sqlite3.Error) as error:
            raise FedgeError(f"memory {self._path}: cannot be opened ({error})") from error
        whose = hashlib.sha256(canonical(spec.to_json(), "spec")).hexdigest()
        if self._said("spec") not in (None, whose):
            self.close()
            raise UserError(f"memory {self._path}: holds examples of another model; let it be forgotten")
        with self._transaction():
            self._say("spec", whose)
            if self._said("key") is None:
                self._say("key", secrets.token_hex(16))

    def close(self) -> None:
        """Release the file."""
        self._connection.close()

    @property
    def consent(self) -> bool:
        """Whether anything may be kept."""
        return self._said("consent") == "yes"

    def give_consent(self) -> None:
        """From now on examples are kept."""
        with self._lock, self._transaction():
            self._say("consent", "yes")

    def withdraw_consent(self) -> None:
        """Nothing is kept any more, and what was is forgotten; consent goes first, in case of a kill."""
        with self._lock:
            with self._transaction():
                self._say("consent", "no")
            self._forget("DELETE FROM examples", ())
            with self._transaction():
                self._connection.execute("DELETE FROM classes")

    def add(self, x: npt.NDArray[Any], label: int, at: float, confidence: float | None = None) -> bool:
        """Offer an example; whether it is kept.

        Args:
            x: raw, (*spec.shape).
            label: its class.
            at: Unix seconds, by which it can be forgotten.
            confidence: of the answer whose label it is; None: a person or a process gave the label.

        Raises:
            DataError: it is no example of this model.
        """
        if x.shape != self._spec.shape or x.dtype != np.dtype(self._spec.dtype):
            raise DataError(f"memory: x is {x.dtype} {x.shape}, not {self._spec.dtype} {self._spec.shape}")
        if not 0 <= label < self._spec.classes:
            raise DataError(f"memory: label {label} is none of {self._spec.classes} classes")
        least = self._settings.least_confidence
        if confidence is not None and (least is None or not confidence >= least):
            return False
        with self._lock:
            if not self.consent:
                return False
            try:
                with self._transaction():
                    return self._put(x, label, at, given=confidence is None)
            except sqlite3.Error:
                return False  # a full disk: this one is not kept, and all others stay

    def examples(self, *, given_only: bool = False) -> Examples:
        """All that is kept, in the order of their places.

        Args:
            given_only: leave out those whose label was an answer.
        """
        query = "SELECT label, x FROM examples WHERE given >= ? ORDER BY place"
        with self._lock:
            rows = self._connection.execute(query, (int(given_only),)).fetchall()
        labels = np.array([label for label, _ in rows], np.int64)
        return Examples(self._arrays([data for _, data in rows]), labels)

    def seen(self) -> dict[int, int]:
        """By class, how many were offered since the memory was begun."""
        with self._lock:
            return dict(self._connection.execute("SELECT label, seen FROM classes ORDER BY label").fetchall())

    def forget(self, *, label: int | None = None, before: float | None = None) -> int:
        """Forget examples; how many.

        Args:
            label: of this class; None: of all.
            before: that came before this time (Unix seconds); None: whenever.
        """
        query = "DELETE FROM examples WHERE (? IS NULL OR label = ?) AND (? IS NULL OR at < ?)"
        with self._lock:
            count = self._forget(query, (label, label, before, before))
            with self._transaction():
                self._connection.execute(_FORGOTTEN, (label, label))
        return count

    def _open(self) -> None:
        self._connection = sqlite3.connect(
            self._path, isolation_level=None, check_same_thread=False, timeout=10
        )
        self._path.chmod(0o600)
        for pragma in ("secure_delete=ON", f"page_size={_PAGE}", "journal_mode=WAL", "synchronous=NORMAL"):
            self._connection.execute(f"PRAGMA {pragma}")
        self._connection.execute(f"PRAGMA max_page_count={self._settings.max_bytes // _PAGE}")
        self._connection.executescript(_SCHEMA)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")

    def _put(self, x: npt.NDArray[Any], label: int, at: float, *, given: bool) -> bool:
        run = self._connection.execute
        seen = dict(run("SELECT label, seen FROM classes").fetchall())
        total = sum(seen.values())
        draw = random.Random(f"{self._said('key')} {total}")  # noqa: S311 - a sample, and no secret
        place = self._place(label, seen, draw.randrange)
        counted = "INSERT INTO classes VALUES (?, 1, 0) ON CONFLICT (label) DO UPDATE SET seen = seen + 1"
        run(counted, (label,))
        if place is None:
            return False
        data = np.ascontiguousarray(x).tobytes()
        run("INSERT OR REPLACE INTO examples VALUES (?, ?, ?, ?, ?)", (place, label, int(given), at, data))
        return True

    def _place(self, label: int, seen: dict[int, int], below: Below) -> int | None:
        run, size = self._connection.execute, self._settings.size
        kept, last = run("SELECT count(*), coalesce(max(place), -1) FROM examples").fetchone()
        if kept < size and last + 1 < size:
            return int(last) + 1
        places = run("SELECT place, label FROM examples ORDER BY place").fetchall()
        if kept < size:  # some were forgotten: the first place that is free
            taken = {place for place, _ in places}
            return next(place for place in range(size) if place not in taken)
        if not self._settings.balanced:
            return uniform(max(sum(seen.values()), size), size, below)
        full = {own for (own,) in run("SELECT label FROM classes WHERE full").fetchall()}
        found = balanced(label, [own for _, own in places], seen, full, size, below)
        for own in full:
            run("UPDATE classes SET full = 1 WHERE label = ?", (own,))
        return None if found is None else places[found][0]

    def _forget(self, query: str, values: tuple[object, ...]) -> int:
        count = self._connection.execute(query, values).rowcount
        self._connection.execute("VACUUM")
        self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return int(count)

    def _arrays(self, rows: list[bytes]) -> npt.NDArray[Any]:
        dtype = np.dtype(self._spec.dtype)
        expected = dtype.itemsize * int(np.prod(self._spec.shape))
        if any(len(row) != expected for row in rows):
            raise FormatError(f"memory {self._path}: is damaged; let it be forgotten")
        flat = np.frombuffer(b"".join(rows), dtype)
        return flat.reshape(len(rows), *self._spec.shape)

    def _said(self, name: str) -> str | None:
        row = self._connection.execute("SELECT value FROM about WHERE name = ?", (name,)).fetchone()
        return None if row is None else str(row[0])

    def _say(self, name: str, value: str) -> None:
        self._connection.execute("INSERT OR REPLACE INTO about VALUES (?, ?)", (name, value))


def remove(folder: Path) -> None:
    """Forget everything that lies there, whatever model it is of; consent has to be given anew.

    Raises:
        FedgeError: a file cannot be removed.
    """
    try:
        for path in (folder / f"memory.db{end}" for end in ("", "-wal", "-shm")):
            path.unlink(missing_ok=True)
    except OSError as error:
        raise FedgeError(f"memory {folder}: cannot be removed ({error.strerror})") from error
