"""Read from any transport: bounded in bytes, held to a pace, and with errors that are ours.

What a fetcher raises is turned into ours where it enters, the first chunk included: a generator that fails
when it is first asked would otherwise carry the transport's own errors past whoever called it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from fedge.errors import AbsentError, FedgeError, FetchError, ForbiddenError, FormatError, SlowError

Seconds = Callable[[], float]
"""A clock that only runs forward, in seconds."""


class Fetcher(Protocol):
    """Any transport: chunks of a file by its name in the repository, from an offset on.

    It gives up by itself when nothing at all comes (a socket's timeout, a call's deadline). It says that a
    file is not there by AbsentError, and that it is not for this device by ForbiddenError; the gRPC status
    codes NOT_FOUND and PERMISSION_DENIED, HTTP's 404 and 403 as errors of the usual libraries carry them, and
    FileNotFoundError say so too. Whatever else it raises is an outage.
    """

    def __call__(self, name: str, maximum: int, offset: int = 0, /) -> Iterator[bytes]:
        """Chunks of the file from byte `offset` on; `maximum` is the most bytes that are wanted."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How slow a stream may be before it is cut: who feeds a device drop by drop keeps it from updating."""

    bytes_per_s: float = 1024.0  # floor, over each window
    window_s: float = 30.0

    def __post_init__(self) -> None:
        """Refuse nonsense on construction."""
        if not (self.bytes_per_s >= 0 and self.window_s > 0):
            raise FormatError(
                f"pace: {self.bytes_per_s} bytes a second over {self.window_s} s; "
                "give 0 or more, over more than 0"
            )


DEFAULT_PACE: Final = Pace()
_CHUNK: Final = 64 * 1024


def chunks_of(
    fetch: Fetcher,
    name: str,
    maximum: int,
    offset: int = 0,
    *,
    pace: Pace = DEFAULT_PACE,
    seconds: Seconds = time.monotonic,
) -> Iterator[bytes]:
    """Chunks of a file, the first of which has come when this returns.

    Args:
        fetch: the transport.
        name: of the file.
        maximum: the most bytes that may come; one more is an error (an endless stream).
        offset: bytes to leave out at the file's start.
        pace: below it the stream is cut.
        seconds: the clock of the pace.

    Raises:
        FetchError: it cannot be fetched.
        SlowError: it comes too slowly.
        FormatError: more than `maximum` bytes come, or something else than bytes.
    """
    start = seconds()
    try:
        source = iter(fetch(name, maximum, offset))
        first = next(source, b"")
    except Exception as error:  # whatever the transport raises: this is where it enters
        raise _ours(error, name) from error
    return _bounded(name, first, source, maximum, _Meter(name, pace, seconds, start))


def within(below: str, fetch: Fetcher) -> Fetcher:
    """The same transport with names below a folder of the repository."""

    def longer(name: str, maximum: int, offset: int = 0, /) -> Iterator[bytes]:
        return fetch(f"{below}/{name}", maximum, offset)

    return longer


def folder(root: Path) -> Fetcher:
    """Fetch from a repository that is mounted or was copied here."""

    def read(name: str, maximum: int, offset: int = 0, /) -> Iterator[bytes]:
        path = (root / name).resolve()
        if not path.is_relative_to(root.resolve()):
            raise FormatError(f"{name[:80]}: leads out of {root}")
        if not path.is_file():
            raise AbsentError(f"{name}: is not in {root}")
        with path.open("rb") as file:
            file.seek(offset)
            while chunk := file.read(_CHUNK):
                yield chunk

    return read


def whole(fetch: Fetcher, name: str, maximum: int, *, pace: Pace = DEFAULT_PACE) -> bytes:
    """A small file in memory; raises as `chunks_of` does."""
    return b"".join(chunks_of(fetch, name, maximum, pace=pace))


class _Meter:
    """Bytes in the window of time that runs."""

    def __init__(self, name: str, pace: Pace, seconds: Seconds, start: float) -> None:
        self._name, self._pace, self._seconds = name, pace, seconds
        self._start, self._bytes = start, 0

    def count(self, length: int) -> None:
        self._bytes += length
        passed = self._seconds() - self._start
        if passed < self._pace.window_s:
            return
        if self._bytes < passed * self._pace.bytes_per_s:
            raise SlowError(
                f"{self._name}: {self._bytes} bytes came in {passed:.0f} s, under the floor of "
                f"{self._pace.bytes_per_s:.0f} a second; try again later, or from another source"
            )
        self._start, self._bytes = self._seconds(), 0


def _bounded(
    name: str, first: bytes, source: Iterator[bytes], maximum: int, meter: _Meter
) -> Iterator[bytes]:
    total, chunk = 0, first
    while True:
        if not isinstance(chunk, bytes | bytearray | memoryview):
            raise FormatError(f"{name}: the fetcher gave {type(chunk).__name__}, not bytes")
        total += len(chunk)
        if total > maximum:  # whatever the transport promises: an endless stream fills a disk
            raise FormatError(f"{name}: more than the {maximum} bytes came that it may have")
        meter.count(len(chunk))
        yield bytes(chunk)
        try:
            chunk = next(source)
        except StopIteration:
            return
        except Exception as error:  # whatever the transport raises: this is where it enters
            raise _ours(error, name) from error


_ABSENT: Final = ("NOT_FOUND", 404)
_FORBIDDEN: Final = ("PERMISSION_DENIED", "FORBIDDEN", 403)


def _codes(error: Exception) -> Iterator[int | str]:
    """What an error of a transport says by its status.

    gRPC's is behind a method and gives an enumeration. HTTP's is a number: `code` of urllib, `status` of
    aiohttp, `status_code` of python-tuf's fetchers, or of the response that requests and httpx name.
    """
    for holder in (error, getattr(error, "response", None)):
        for where in ("code", "status", "status_code"):
            found: Any = getattr(holder, where, None)
            found = found() if callable(found) and where == "code" else found
            found = getattr(found, "name", found)
            if isinstance(found, int | str):
                yield found


def _ours(error: Exception, name: str) -> FedgeError:
    """Only the source's own word makes a file absent: an outage taken for that would freeze the root."""
    if isinstance(error, FedgeError):
        return error
    codes = set(_codes(error))
    if not codes.isdisjoint(_ABSENT) or isinstance(error, FileNotFoundError):
        return AbsentError(f"{name}: the source has no such file")
    if not codes.isdisjoint(_FORBIDDEN):
        return ForbiddenError(f"{name}: the source says that this device may not have it; ask who runs it")
    what = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return FetchError(f"{name}: cannot be fetched now ({what}); try again later")
