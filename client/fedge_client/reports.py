"""What this device has to tell of its releases: kept in one small file until the server has it.

The file is shared by all processes of the device, and each thing is said once: the server counts it once
anyway. A disk that refuses it costs a report, and nothing else. It names the tier whose versions it speaks
of: a device that has moved to another one has nothing to tell of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from fedge.errors import FormatError
from fedge.files import read_bounded, sole_holder, write_atomically
from fedge_client.delivery import Report
from fedge_client.device import DELIVERY, REPORTS, of_this_tier, tier_at

MAX_WAITING: Final = 64  # the oldest is forgotten first
MAX_SAID: Final = 256
SCHEMA: Final = 1
_MAX_BYTES: Final = 64 * 1024


@dataclass(frozen=True, slots=True)
class _Kept:
    """The file's content."""

    waiting: tuple[Report, ...] = ()  # to be sent, oldest first
    said: tuple[str, ...] = ()  # `VERSION KIND` of all that was ever to be sent, oldest first


class Reports:
    """The reports of a device's home."""

    def __init__(self, home: Path) -> None:
        self._home, self._path = home, home / DELIVERY / REPORTS

    def waiting(self) -> list[Report]:
        """Those that the server does not have yet, oldest first."""
        return list(self._read().waiting)

    def has_said(self, version: int, kind: str) -> bool:
        """Whether such a report was made before, sent or not."""
        return f"{version} {kind}" in self._read().said

    def add(self, reports: Iterable[Report]) -> None:
        """Keep reports, unless they were made before.

        Raises:
            OSError: the disk refuses it.
        """

        def change(kept: _Kept) -> _Kept:
            new = [one for one in reports if _name(one) not in kept.said]
            waiting = (*kept.waiting, *new)[-MAX_WAITING:]
            return _Kept(waiting, (*kept.said, *map(_name, new))[-MAX_SAID:])

        self._change(change)

    def drop(self, reports: Iterable[Report]) -> None:
        """The server has these.

        Raises:
            OSError: the disk refuses it.
        """
        sent = set(reports)
        self._change(lambda kept: _Kept(tuple(one for one in kept.waiting if one not in sent), kept.said))

    def _change(self, change: Callable[[_Kept], _Kept]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with sole_holder(self._path.with_name(".reports.lock"), patience_s=5.0):
            for path in self._path.parent.glob(f".{REPORTS}.*"):
                path.unlink(missing_ok=True)  # half-written by a process that was killed
            before = self._read()
            after = change(before)
            if after != before:
                content = {**asdict(after), "schema": SCHEMA, "tier": tier_at(self._home)}
                write_atomically(self._path, json.dumps(content, sort_keys=True).encode() + b"\n")

    def _read(self) -> _Kept:
        """What is kept; nothing where it is of another tier, or damaged: what is said twice counts once."""
        if not self._path.exists():
            return _Kept()
        try:
            value: Any = json.loads(read_bounded(self._path, _MAX_BYTES))
            if value["schema"] != SCHEMA or not of_this_tier(self._home, value.get("tier")):
                return _Kept()
            waiting = tuple(Report(one["version"], one["kind"], one["value"]) for one in value["waiting"])
            return _Kept(waiting, tuple(map(str, value["said"])))
        except (FormatError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return _Kept()


def _name(report: Report) -> str:
    return f"{report.version} {report.kind}"
