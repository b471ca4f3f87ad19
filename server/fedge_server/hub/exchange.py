"""Open messages between runs and devices: in memory for speed, in the database so that they survive.

A message is open from its push until its answer is committed, its deadline passes or its run closes it.
All methods run on the hub's event loop; the database is asked in threads.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from fedge.errors import FedgeError
from fedge.wire.v1 import link_pb2 as link
from fedge.wire.v1 import records_pb2 as records
from fedge_server.hub import answers
from fedge_server.hub.fleet import Fleet
from fedge_server.hub.traffic import Meter
from fedge_server.hub.watching import Watch, Watches
from fedge_server.monitoring.metrics import EXPIRED, GIVEN_UP, MESSAGES
from fedge_server.registry.queue import Answer, CloseCount, Queue, Queued

_log = logging.getLogger("fedge.hub")

MAX_BATCH: Final = 256  # answers committed in one transaction
STOP_S: Final = 5.0  # that answers in hand may take to be committed when the hub stops
RETRY_S: Final = 5.0  # before a failure that could not be committed is tried again
REMEMBERED: Final = 50_000  # closed messages whose late answers are still told apart from garbage


@dataclass(slots=True)
class Flight:
    """An open message, and when something last happened to it (Unix seconds)."""

    message: Queued
    touched: float
    sent: float | None = None  # time.monotonic() when its Work was last written to the device


@dataclass(frozen=True, slots=True)
class Closed:
    """What is remembered of a message that nobody waits for any more."""

    run_id: str
    node_id: int


class Exchange:
    """The open messages of all runs."""

    def __init__(
        self, queue: Queue, fleet: Fleet, *, grace_s: float, clock: Callable[[], float] = time.time
    ) -> None:
        self._queue = queue
        self._fleet = fleet
        self._grace_s = grace_s
        self._clock = clock
        self._flights: dict[str, Flight] = {}
        self._of_node: dict[int, dict[str, None]] = {}
        self._contents: dict[str, records.Content] = {}  # of open messages, by digest: shared by a round
        self._uses: dict[str, int] = {}
        self._answered: dict[str, tuple[str, int]] = {}  # until closed: run and node
        self._closed: OrderedDict[str, Closed] = OrderedDict()
        self._watches = Watches()
        self._due: list[tuple[float, str, int]] = []  # time, message (deadline) or "", node (grace)
        self._away: dict[int, float] = {}
        self._traffic = Meter(queue)
        self._commits: asyncio.Queue[tuple[Answer, asyncio.Future[str]]] = asyncio.Queue()
        self._clock_woken = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self.post_work: Callable[[int, str], None] = lambda _node, _message: None
        self.post_cancel: Callable[[int, str], None] = lambda _node, _message: None
        self.ended: Callable[[str], None] = lambda _message: None

    async def start(self) -> None:
        """Take up the open messages of the database, as after a restart, and begin to work."""
        for message in await asyncio.to_thread(self._queue.open_messages):
            await self._open(message, None)
        self._tasks = [
            asyncio.create_task(self._commit_forever()),
            asyncio.create_task(self._keep_time()),
        ]

    async def stop(self) -> None:
        """Commit what has been handed in and end."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._commits.join(), STOP_S)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._traffic.save()

    def flight(self, message_id: str) -> Flight | None:
        """The open message of this id."""
        return self._flights.get(message_id)

    def owner_of_ended(self, message_id: str) -> int | None:
        """The node of a message that is answered or closed; None: it is not known here."""
        if (answered := self._answered.get(message_id)) is not None:
            return answered[1]
        closed = self._closed.get(message_id)
        return closed.node_id if closed else None

    def open_of(self, node_id: int) -> list[str]:
        """The open messages of a device, oldest first."""
        return list(self._of_node.get(node_id, ()))

    @property
    def load(self) -> tuple[int, int, int]:
        """Messages that are open, those among them that were never sent, and answers yet to be committed."""
        unsent = sum(flight.sent is None for flight in self._flights.values())
        return len(self._flights), unsent, self._commits.qsize()

    def content_of(self, flight: Flight) -> records.Content:
        """What a message says; one object serves all messages with the same content."""
        return self._contents[flight.message.content]

    def work(self, message_id: str) -> link.Work | None:
        """The Work of an open message as it goes to its device now; None: it has ended meanwhile."""
        flight = self._flights.get(message_id)
        if flight is None:
            return None
        message = flight.message
        flight.sent = time.monotonic()
        flight.touched = self._clock()
        return link.Work(
            message_id=message.id,
            run_id=message.run_id,
            task=message.task,
            task_digest=message.task_digest,
            message_type=message.type,
            group_id=message.group_id,
            content=self.content_of(flight),
            seconds_left=max(message.deadline - self._clock(), 0.0),
            max_result_bytes=message.max_result_bytes,
            node_id=message.node_id,
        )

    def here(self, node_id: int) -> None:
        """The device has connected."""
        self._away.pop(node_id, None)

    def gone(self, node_id: int) -> None:
        """The device has left; its open messages fail unless it is back within the grace."""
        self._away[node_id] = self._clock()
        if self._of_node.get(node_id):
            self._at(self._clock() + self._grace_s, "", node_id)
        else:
            self._away.pop(node_id)

    def count(self, run_id: str, *, down: int = 0, up: int = 0) -> None:
        """Tensor bytes that have travelled."""
        self._traffic.count(run_id, down=down, up=up)

    async def answer(self, answer: Answer) -> str:
        """Commit an answer, together with others that are waiting: 'accepted', 'again' or 'late'.

        Raises:
            FedgeError: the database refuses; the device may try again.
        """
        done: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._commits.put_nowait((answer, done))
        return await asyncio.shield(done)

    async def attach(self, run_id: str) -> str:
        """Begin a session of a run: whatever it had open before is closed."""
        session = await asyncio.to_thread(self._queue.attach, run_id)
        self._end_run(run_id)
        return session

    async def forget(self, run_id: str) -> None:
        """A run is over: whatever it had open is closed, and nothing of it is kept."""
        self._end_run(run_id)
        await asyncio.to_thread(self._queue.forget, run_id)

    async def push(
        self,
        run_id: str,
        session: str,
        messages: Sequence[Queued],
        contents: Mapping[str, bytes],
        hopeless: Mapping[str, str],
    ) -> None:
        """Queue messages and send them to those devices that are here; again is no error.

        Args:
            run_id: of all of them.
            session: the run's newest.
            messages: to queue.
            contents: serialised Contents by digest.
            hopeless: messages that fail at once, by id, and why.

        Raises:
            RoundError: the session is not the run's newest.
        """
        new = [m for m in messages if m.id not in self._flights and m.id not in self._answered]
        await asyncio.to_thread(self._queue.push, run_id, session, new, contents)
        ids = [m.id for m in new]
        known = await asyncio.to_thread(self._queue.answered, run_id, session, ids)  # before a hub's restart
        self._answered.update({answer.message_id: (run_id, answer.node_id) for answer in known})
        for message in new:
            if message.id not in self._answered and message.id not in self._flights:  # pushed twice at once
                await self._open(message, contents.get(message.content))
                if (reason := hopeless.get(message.id)) is not None:
                    self._fail(message.id, reason)

    async def close(self, run_id: str, session: str, message_ids: Sequence[str]) -> CloseCount:
        """Nobody waits for these any more: devices are told, and later answers are late."""
        await self._traffic.save()
        count = await asyncio.to_thread(self._queue.close, run_id, session, message_ids)
        self._end([m for m in message_ids if self._of_run(m, run_id)])
        for message_id in message_ids:
            self._forget_answered(message_id)
        return count

    def watch(self, message_ids: Iterable[str]) -> Watch:
        """Hear of the ends of those messages that are open now."""
        return self._watches.add({m for m in message_ids if m in self._flights})

    def unwatch(self, watch: Watch) -> None:
        """Stop hearing."""
        self._watches.remove(watch)

    async def answered(self, run_id: str, session: str, message_ids: Sequence[str]) -> list[Answer]:
        """The committed answers of these messages."""
        return await asyncio.to_thread(self._queue.answered, run_id, session, message_ids)

    def _end_run(self, run_id: str) -> None:
        self._end([f.message.id for f in self._flights.values() if f.message.run_id == run_id])
        for message_id in [m for m, (run, _) in self._answered.items() if run == run_id]:
            self._forget_answered(message_id)

    def _of_run(self, message_id: str, run_id: str) -> bool:
        flight = self._flights.get(message_id)
        return flight is not None and flight.message.run_id == run_id

    async def _open(self, message: Queued, content: bytes | None) -> None:
        if message.content not in self._contents:
            body = content if content is not None else await self._stored(message.content)
            self._contents[message.content] = records.Content.FromString(body)
        self._uses[message.content] = self._uses.get(message.content, 0) + 1
        now = self._clock()
        self._flights[message.id] = Flight(message, now)
        MESSAGES.inc()
        self._of_node.setdefault(message.node_id, {})[message.id] = None
        self._at(message.deadline, message.id, message.node_id)
        if message.node_id in self._fleet.members:
            self.post_work(message.node_id, message.id)
        else:
            self._away.setdefault(message.node_id, now)
            self._at(now + self._grace_s, "", message.node_id)

    async def _stored(self, digest: str) -> bytes:
        return await asyncio.to_thread(self._queue.content, digest)

    def _remove(self, message_id: str) -> Flight | None:
        """Take a message out of the open ones and tell who waits for it."""
        flight = self._flights.pop(message_id, None)
        if flight is None:
            return None
        message = flight.message
        if (mine := self._of_node.get(message.node_id)) is not None:
            mine.pop(message_id, None)
            if not mine:
                del self._of_node[message.node_id]
        self._uses[message.content] -= 1
        if not self._uses[message.content]:
            del self._uses[message.content], self._contents[message.content]
        self._watches.end(message_id)
        self.ended(message_id)
        return flight

    def _end(self, message_ids: Iterable[str]) -> None:
        """Close open messages: their devices are told, and late answers are known as such."""
        for message_id in message_ids:
            if (flight := self._remove(message_id)) is not None:
                self._remember_closed(message_id, Closed(flight.message.run_id, flight.message.node_id))
                self.post_cancel(flight.message.node_id, message_id)

    def _forget_answered(self, message_id: str) -> None:
        if (answered := self._answered.pop(message_id, None)) is not None:
            self._remember_closed(message_id, Closed(*answered))

    def _remember_closed(self, message_id: str, closed: Closed) -> None:
        self._closed[message_id] = closed
        while len(self._closed) > REMEMBERED:
            self._closed.popitem(last=False)

    async def _commit_forever(self) -> None:
        while True:
            batch = [await self._commits.get()]
            while len(batch) < MAX_BATCH and not self._commits.empty():
                batch.append(self._commits.get_nowait())
            try:
                outcomes = await asyncio.to_thread(self._queue.answer, [answer for answer, _ in batch])
            except Exception as error:  # noqa: BLE001 - whatever the database raises, the hub goes on
                _log.error("answers cannot be committed: %s", error)
                for _, done in batch:
                    done.set_exception(FedgeError(f"the answer cannot be committed ({error})"))
                    done.exception()  # its device may have gone: nobody need look
                    self._commits.task_done()
                continue
            await self._traffic.save()  # before anybody hears: a run that closes its round sees it
            for (answer, done), outcome in zip(batch, outcomes, strict=True):
                if outcome == "late":  # the database has closed it, whatever we held of it
                    self._end([answer.message_id])
                else:
                    self._settle(answer)
                done.set_result(outcome)
                self._commits.task_done()

    def _settle(self, answer: Answer) -> None:
        flight = self._flights.get(answer.message_id)
        if flight is not None:
            self._answered[answer.message_id] = (flight.message.run_id, flight.message.node_id)
            self._remove(answer.message_id)

    def _at(self, when: float, message_id: str, node_id: int) -> None:
        if len(self._due) > 1000 + 4 * len(self._flights):  # most of them have ended long ago
            self._due = [due for due in self._due if not due[1] or due[1] in self._flights]
            heapq.heapify(self._due)
        heapq.heappush(self._due, (when, message_id, node_id))
        if self._due[0][0] == when:
            self._clock_woken.set()

    async def _keep_time(self) -> None:
        while True:
            expired = []
            while self._due and self._due[0][0] <= self._clock():
                _, message_id, node_id = heapq.heappop(self._due)
                if not message_id:
                    self._give_up(node_id)
                elif message_id in self._flights:
                    expired.append(message_id)
            if expired:
                await self._expire(expired)
            wait = self._due[0][0] - self._clock() if self._due else None
            self._clock_woken.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._clock_woken.wait(), wait)

    async def _expire(self, message_ids: Sequence[str]) -> None:
        """Close messages whose deadline has passed."""
        self._end(message_ids)
        EXPIRED.inc(len(message_ids))
        try:
            await asyncio.to_thread(self._queue.expire, message_ids)
        except Exception as error:  # noqa: BLE001 - the run closes them again; the clock must go on
            _log.error("messages past their deadline stay open in the database: %s", error)

    def _give_up(self, node_id: int) -> None:
        """Fail the open messages of a device that has been away for the grace."""
        if (away := self._away.get(node_id)) is None:
            return
        ids = self.open_of(node_id)
        if not ids:
            del self._away[node_id]
            return
        since = max([away, *(self._flights[m].touched for m in ids)])
        if since + self._grace_s > self._clock():
            self._at(since + self._grace_s, "", node_id)
            return
        reason = f"the device went away and was not back within {self._grace_s:g} s"
        for message_id in ids:
            self._fail(message_id, reason)
        del self._away[node_id]
        GIVEN_UP.inc(len(ids))
        _log.warning("node %d: %d messages failed: %s", node_id, len(ids), reason, extra={"node": node_id})

    def _fail(self, message_id: str, reason: str) -> None:
        """Answer a message in the place of a device that cannot."""
        if message_id not in self._flights:
            return
        loop = asyncio.get_running_loop()
        done: asyncio.Future[str] = loop.create_future()

        def look(done: asyncio.Future[str]) -> None:
            if not done.cancelled() and done.exception() is not None:  # else the round waits for nobody
                loop.call_later(RETRY_S, self._fail, message_id, reason)

        done.add_done_callback(look)
        result = answers.failure(answers.NODE_UNAVAILABLE, reason)
        self._commits.put_nowait((Answer(message_id, result), done))
