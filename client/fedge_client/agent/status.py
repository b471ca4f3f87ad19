"""What the agent says of itself to other processes on the device: a small file, and a lock while it runs."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

from fedge.errors import FedgeError, FormatError
from fedge.files import is_held, read_bounded, sole_holder

FILE: Final = "agent-status.json"
LOCK: Final = "agent.lock"
_SCHEMA: Final = 1
_MAX_BYTES: Final = 256 * 1024
_DELAY_S: Final = 0.1


@contextmanager
def only_agent(home: Path) -> Iterator[None]:
    """Hold the home's lock: two agents must not answer one message.

    Raises:
        FedgeError: another agent runs in this home, or the disk refuses the lock.
    """
    with ExitStack() as held:
        try:
            held.enter_context(sole_holder(home / LOCK))
        except BlockingIOError as error:
            raise FedgeError(f"{home}: an agent runs here already; one home serves one agent") from error
        except OSError as error:
            raise FedgeError(f"{home / LOCK}: cannot be made ({error.strerror})") from error
        yield


def is_running(home: Path) -> bool:
    """Whether an agent runs in this home."""
    return is_held(home / LOCK)


def read(home: Path) -> dict[str, Any]:
    """What the agent wrote last; empty when none ever ran here.

    Raises:
        FormatError: damaged.
    """
    path = home / FILE
    if not path.exists():
        return {}
    try:
        value = json.loads(read_bounded(path, _MAX_BYTES))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: damaged; it is written again when the agent starts") from error
    if not isinstance(value, dict) or value.pop("schema", None) != _SCHEMA:
        raise FormatError(f"{path}: written by another version of fedge; restart the agent")
    return value


class Status:
    """The file's content; what changes is written a moment later, together with what else has changed."""

    def __init__(self, home: Path, facts: Mapping[str, Any]) -> None:
        self._path = home / FILE
        self._shown: dict[str, Any] = {"pid": os.getpid(), "since": time.time(), **facts}
        self._pending: asyncio.TimerHandle | None = None

    def show(self, **facts: Any) -> None:
        """Change some facts."""
        if all(self._shown.get(name, ...) == value for name, value in facts.items()):
            return
        self._shown |= facts
        if self._pending is None:
            self._pending = asyncio.get_running_loop().call_later(_DELAY_S, self.write)

    @property
    def facts(self) -> Mapping[str, Any]:
        """All that it says now."""
        return self._shown

    def write(self) -> None:
        """Write now; a disk that refuses it does not stop the agent."""
        if self._pending is not None:
            self._pending.cancel()
            self._pending = None
        data = json.dumps({"schema": _SCHEMA, **self._shown}, sort_keys=True) + "\n"
        new = self._path.with_name(f".{FILE}.new")
        try:
            new.write_text(data, encoding="utf-8")  # not synced: nobody needs it after a power cut
            new.replace(self._path)
        except OSError:
            return


def notify(line: str) -> None:
    """Tell systemd, when it has started this process and waits to hear."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    name = "\0" + address[1:] if address.startswith("@") else address
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as notifier:
        try:
            notifier.sendto(line.encode(), name)
        except OSError:
            return
