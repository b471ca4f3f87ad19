"""So many transfers at full speed; one that has become slow makes room and goes on in small pieces.

A place bounds what is in memory for transfers, however many devices ask at once. Without the second rule
a few stalled devices would keep all places, and everybody else waiting. Places are given in the order in
which they were asked for: by a transfer itself or, before it begins, by a turn.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Final

from fedge.wire import CHUNK_BYTES

SLOW_S: Final = 5.0  # a chunk that takes longer gives up its place, and so does a transfer that has
SLOW_BYTES_PER_S: Final = 10_000  # after so long not kept up this rate: bytes that trickle are a stall too
SLOW_CHUNK_BYTES: Final = 16 * 1024
KEPT_S: Final = 10.0  # that a place waits for its transfer, which needs a connection first


@dataclass(slots=True)
class Place:
    """One transfer's place."""

    _release: Callable[[], None]
    fast: bool = True
    _began: float = field(default_factory=time.monotonic)
    _moved: int = 0  # bytes

    @property
    def chunk_bytes(self) -> int:
        """How much to move at once."""
        return CHUNK_BYTES if self.fast else SLOW_CHUNK_BYTES

    @contextmanager
    def chunk(self) -> Iterator[None]:
        """Around the moving of one chunk; when that takes too long, the place is given up meanwhile."""
        timer = asyncio.get_running_loop().call_later(SLOW_S, self.leave)
        try:
            yield
        finally:
            timer.cancel()

    def moved(self, count: int) -> None:
        """So many bytes more have been transferred."""
        self._moved += count
        took = time.monotonic() - self._began
        if took > SLOW_S and self._moved < took * SLOW_BYTES_PER_S:
            self.leave()

    def leave(self) -> None:
        """Make room; a second time is no error."""
        if self.fast:
            self.fast = False
            self._release()


class Few:
    """So many things at once for each device: one that asks for more takes nothing from the others."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._now: Counter[int] = Counter()

    @contextmanager
    def one(self, node_id: int) -> Iterator[bool]:
        """Whether the device may have one more; it counts until the block ends."""
        allowed = self._now[node_id] < self._most
        if not allowed:
            yield False
            return
        self._now[node_id] += 1
        try:
            yield True
        finally:
            self._now[node_id] -= 1
            if not self._now[node_id]:
                del self._now[node_id]


@dataclass(slots=True, eq=False)
class _Turn:
    """Somebody in the line, or a place that is kept for them."""

    come: asyncio.Future[None]  # cancelled: given up
    message_id: str = ""  # "": a transfer that is here already
    node_id: int = 0
    ends: asyncio.TimerHandle | None = None  # once it has come, and its transfer has not begun

    @property
    def has_come(self) -> bool:
        """Whether a place belongs to it."""
        return self.come.done() and not self.come.cancelled()


class Lanes:
    """A bounded number of places."""

    def __init__(self, places: int) -> None:
        self._free = places
        self._line: deque[_Turn] = deque()
        self._asked: dict[str, _Turn] = {}  # turns whose transfer has not begun, by message

    async def turn(self, message_id: str, node_id: int, wait_s: float) -> bool:
        """Whether a place is kept now for the transfer of a message, after waiting for one.

        Who asks again keeps their place in the line. A place that is not used within `KEPT_S` goes to the
        next.

        Args:
            message_id: of the transfer.
            node_id: of the device, see `give_back`.
            wait_s: at most.
        """
        turn = self._asked.get(message_id)
        if turn is None:
            turn = self._asked[message_id] = self._line_up(message_id, node_id)
        await asyncio.wait([turn.come], timeout=wait_s)
        return turn.has_come

    @asynccontextmanager
    async def place(self, message_id: str = "") -> AsyncIterator[Place]:
        """The place that is kept for a message, or the next one that is free; given back afterwards."""
        turn = self._asked.pop(message_id, None) or self._line_up()
        if turn.ends is not None:
            turn.ends.cancel()
        try:
            await turn.come
        except asyncio.CancelledError:
            if turn.has_come:
                self._release()
            raise
        place = Place(self._release)
        try:
            yield place
        finally:
            place.leave()

    def forget(self, message_id: str) -> None:
        """Nobody waits for this message any more: its turn goes to the next."""
        if (turn := self._asked.get(message_id)) is not None:
            self._give_up(turn)

    def give_back(self, node_id: int) -> None:
        """A device has left: nothing is kept for it, and it stands in no line."""
        mine = [turn for turn in self._asked.values() if turn.node_id == node_id]
        for turn in sorted(
            mine, key=lambda turn: turn.has_come
        ):  # a place must not go to another of its turns
            self._give_up(turn)

    def _line_up(self, message_id: str = "", node_id: int = 0) -> _Turn:
        turn = _Turn(asyncio.get_running_loop().create_future(), message_id, node_id)
        self._line.append(turn)
        self._call_next()
        return turn

    def _call_next(self) -> None:
        while self._free and self._line:
            turn = self._line.popleft()
            if turn.come.done():  # it did not wait
                continue
            self._free -= 1
            turn.come.set_result(None)
            if turn.message_id:
                turn.ends = asyncio.get_running_loop().call_later(KEPT_S, self._give_up, turn)

    def _give_up(self, turn: _Turn) -> None:
        """Nobody uses this turn; if its place has come, it goes to the next."""
        if self._asked.get(turn.message_id) is turn:
            del self._asked[turn.message_id]
        if turn.ends is not None:
            turn.ends.cancel()
        if turn.has_come:
            self._release()
        else:
            turn.come.cancel()

    def _release(self) -> None:
        self._free += 1
        self._call_next()
