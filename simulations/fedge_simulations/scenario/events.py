"""events.jsonl: what befell every client that was asked, written down by round and read again.

The first line names the population; each further line is one sending of messages, in columns:

    {"fedge-events": 1, "clients": 1000, "seed": 0}
    {"round": 1, "kind": "train", "clock_s": 0.5, "client": [3, 8], "arrives_s": [0.1, 0.4],
     "lost": {"8": "dropped out"}, "attack": {"3": "nan"}}

`arrives_s` counts from `clock_s`, the simulated seconds of the run when the messages were sent; of a lost
client it is when the server hears of that, and null when it never does. `work_s` stands beside it where
batteries are simulated. Who was cut off by quorum or deadline stands there like the others: it would have
arrived then.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

from fedge.config import ATTACK
from fedge.errors import DataError, RoundError
from fedge_simulations.course import Fate

EVENTS: Final = "events.jsonl"  # in the run folder
VERSION: Final = 1
MAX_LINE: Final = 256 * 2**20  # about four million clients asked together
MAX_REASON: Final = 200  # characters


@dataclass(frozen=True, slots=True)
class Sending:
    """Messages that were sent together, and what became of each."""

    round: int
    kind: str  # message type
    clock_s: float
    client: Sequence[int]  # node ids
    fates: Sequence[Fate]
    work_s: Sequence[float] | None  # seconds that each worked; None: not asked for

    def to_line(self) -> bytes:
        """As it stands in the file."""
        pairs = list(zip(self.client, self.fates, strict=True))
        plain: dict[str, Any] = {
            "round": self.round,
            "kind": self.kind,
            "clock_s": self.clock_s,
            "client": list(self.client),
            "arrives_s": [f.arrives_s if math.isfinite(f.arrives_s) else None for f in self.fates],
        }
        if self.work_s is not None:
            plain["work_s"] = list(self.work_s)
        if lost := {str(client): fate.lost for client, fate in pairs if fate.lost}:
            plain["lost"] = lost
        if attack := {str(client): fate.attack for client, fate in pairs if fate.attack}:
            plain["attack"] = attack
        return json.dumps(plain, separators=(",", ":")).encode() + b"\n"

    @classmethod
    def of_line(cls, line: bytes) -> Sending:
        """Read a line, which may come from anywhere.

        Raises:
            ValueError: it is malformed.
        """
        plain = json.loads(line)
        try:
            client = plain["client"]
            arrives_s = [math.inf if value is None else _seconds(value) for value in plain["arrives_s"]]
            lost, attack = _words(plain.get("lost", {})), _words(plain.get("attack", {}))
            known = {str(node) for node in client}
            if not all(type(node) is int and node > 0 for node in client) or len(known) != len(client):
                raise ValueError("client must hold different node ids from 1")
            if not known >= {*lost, *attack} or not all(ATTACK.fullmatch(kind) for kind in attack.values()):
                raise ValueError("lost or attack names a client that was not asked, or an unknown attack")
            work = plain.get("work_s")
            found = cls(
                round=_whole(plain["round"]),
                kind=str(plain["kind"]),
                clock_s=_seconds(plain["clock_s"]),
                client=client,
                fates=[
                    Fate(seconds, lost.get(str(node), ""), attack.get(str(node), ""))
                    for node, seconds in zip(client, arrives_s, strict=True)
                ],
                work_s=None if work is None else [_seconds(value) for value in work],
            )
            if found.work_s is not None and len(found.work_s) != len(client):
                raise ValueError("work_s is not as long as client")
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error
        return found


def _seconds(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value < math.inf:
        raise ValueError(f"{value!r} is no time in seconds")
    return float(value)


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no whole number from 0")
    return value


def _words(value: Any) -> Mapping[str, str]:
    if not isinstance(value, dict) or not all(isinstance(word, str) for word in value.values()):
        raise ValueError("lost and attack must be tables of text")
    return {key: word[:MAX_REASON] for key, word in value.items()}


class Recorder:
    """Appends sendings to a file that a killed run may have left anyhow."""

    def __init__(self, path: Path, *, clients: int, seed: int) -> None:
        self._path = path
        self._first = {"fedge-events": VERSION, "clients": clients, "seed": seed}

    def resume(self, before: int) -> list[Sending]:
        """Cut off what belongs to this round or a later one, or is not whole; returns what is kept.

        Raises:
            DataError: the file cannot be read or written.
        """
        kept: list[Sending] = []
        try:
            end = 0
            if self._path.exists():
                with self._path.open("rb") as file:
                    if _is_line(first := file.readline(MAX_LINE)) and json.loads(first) == self._first:
                        end = file.tell()
                        for sending in _whole_lines(file):
                            if sending.round >= before:
                                break
                            kept.append(sending)
                            end = file.tell()
            with self._path.open("r+b" if self._path.exists() else "wb") as file:
                file.truncate(end)
                if not end:
                    file.write(json.dumps(self._first).encode() + b"\n")
        except (OSError, ValueError) as error:
            raise DataError(f"{self._path}: cannot be read or written ({error})") from error
        return kept

    def append(self, sending: Sending) -> None:
        """Write it down.

        Raises:
            DataError: the file cannot be written.
        """
        try:
            with self._path.open("ab") as file:
                file.write(sending.to_line())
        except OSError as error:
            raise DataError(f"{self._path}: cannot be written ({error.strerror})") from error


def _is_line(line: bytes) -> bool:
    return line.endswith(b"\n")


def _whole_lines(file: BinaryIO) -> Iterator[Sending]:
    """The sendings of a file of ours up to the first that was cut off by a crash."""
    while _is_line(line := file.readline(MAX_LINE)):
        try:
            yield Sending.of_line(line)
        except ValueError:
            return


class Recording:
    """A recorded run, checked when it is opened and read round by round."""

    def __init__(self, path: Path, *, clients: int) -> None:
        """Check all of it.

        Raises:
            DataError: it cannot be read, is malformed, or is of another population.
        """
        self._path = path
        self._places: dict[tuple[int, str], list[int]] = {}
        self.kinds: set[str] = set()  # of attacks in it
        self.has_work = True  # whether it says how long clients worked
        try:
            with path.open("rb") as file:
                self._check_first(file.readline(MAX_LINE), clients)
                self._index(file, clients)
        except OSError as error:
            raise DataError(f"scenario.replay: {path} cannot be read ({error.strerror})") from error
        self._now: tuple[tuple[int, str], dict[int, tuple[Fate, float]]] = ((-1, ""), {})

    def _check_first(self, line: bytes, clients: int) -> None:
        try:
            first = json.loads(line)
            version, count = first["fedge-events"], first["clients"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"scenario.replay: {self._path} is no recording; name the {EVENTS} of a run"
            ) from error
        if version != VERSION:
            raise DataError(
                f"scenario.replay: {self._path} has version {version!r}; this fedge reads {VERSION}"
            )
        if count != clients:
            raise DataError(
                f"scenario.replay: {self._path} is of {count} clients, this run has {clients}; "
                "use the recording's clients.count"
            )

    def _index(self, file: BinaryIO, clients: int) -> None:
        number = 1
        while True:
            place, line, number = file.tell(), file.readline(MAX_LINE), number + 1
            if not line:
                return
            try:
                sending = Sending.of_line(line)
                if max(sending.client, default=0) > clients:
                    raise ValueError(f"client {max(sending.client)} is not among {clients}")
            except ValueError as error:
                raise DataError(
                    f"scenario.replay: {self._path} line {number}: {error}; record the run anew, "
                    "or delete the line if it is the last of a run that was killed"
                ) from error
            self._places.setdefault((sending.round, sending.kind), []).append(place)
            self.kinds |= {fate.attack for fate in sending.fates if fate.attack}
            self.has_work = self.has_work and sending.work_s is not None

    def fates(self, number: int, kind: str, node_ids: Sequence[int]) -> tuple[list[Fate], list[float]]:
        """What befell these clients in that round, and how long they worked (0: not recorded).

        Raises:
            RoundError: the round, or one of them in it, is not recorded.
        """
        known = self._of(number, kind)
        if missing := [node for node in node_ids if node not in known]:
            rounds = max((each for each, _ in self._places), default=0)
            what = (f"client {missing[0]}, " if known else "") + f"{kind} in round {number}"
            raise RoundError(
                f"scenario.replay: {what} is not in {self._path}, which ends with round {rounds}; "
                "leave seed, clients, rounds and scenario as they were recorded"
            )
        found = [known[node] for node in node_ids]
        return [fate for fate, _ in found], [work for _, work in found]

    def attack_of(self, number: int, node_id: int) -> str:
        """What a client does in a round."""
        known = self._of(number, "train").get(node_id)
        return known[0].attack if known else ""

    def _of(self, number: int, kind: str) -> dict[int, tuple[Fate, float]]:
        if self._now[0] != (number, kind):
            known: dict[int, tuple[Fate, float]] = {}
            with self._path.open("rb") as file:
                for place in self._places.get((number, kind), ()):
                    file.seek(place)
                    sending = Sending.of_line(file.readline(MAX_LINE))
                    work = sending.work_s or [0.0] * len(sending.client)
                    known |= dict(zip(sending.client, zip(sending.fates, work, strict=True), strict=True))
            self._now = ((number, kind), known)
        return self._now[1]
