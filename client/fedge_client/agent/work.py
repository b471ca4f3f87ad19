"""Messages on a device, from their arrival to an answer in the outbox: one at a time is worked on."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import shutil
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc

from fedge.errors import FedgeError
from fedge.wire import MAX_MESSAGE_BYTES
from fedge.wire.v1.link_pb2 import Work
from fedge.wire.v1.records_pb2 import Result
from fedge_client.agent.answering import LOAD_FAILED, failure
from fedge_client.agent.child import TrainingChild
from fedge_client.agent.connection import Closed, Link, said
from fedge_client.agent.figures import COUNTED
from fedge_client.agent.frames import Job
from fedge_client.agent.objects import ObjectCache
from fedge_client.agent.outbox import Outbox, is_message_id
from fedge_client.agent.settings import OfferedTask

MAX_WAITING: Final = 64  # messages; a hub that sends more is answered with failures
MAX_SECONDS: Final = 60 * 24 * 3600.0  # that a message may take
CHEAP_S: Final = 1.0  # of work: an answer without tensors that took less is not kept on the disk
RETRY_S: Final = 0.5  # before a transfer that broke is taken up again
KEEP_STATE_S: Final = 60 * 24 * 3600.0  # of a run that has sent nothing for so long

log = logging.getLogger("fedge.agent")

_GONE = (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.INVALID_ARGUMENT)


@dataclass(frozen=True, slots=True)
class Held:
    """A message that waits or is worked on."""

    work: Work
    deadline: float  # on the event loop's clock


@dataclass(frozen=True, slots=True)
class Offer:
    """A task of this device and the digest that it has here."""

    task: OfferedTask
    digest: str


class Linked:
    """The connection of the moment, for whoever has something to carry over it."""

    def __init__(self) -> None:
        self._link: Link | None = None
        self._changed = asyncio.Event()

    @property
    def is_set(self) -> bool:
        """Whether there is a connection."""
        return self._link is not None

    def set(self, link: Link | None) -> None:
        """There is a connection now, or there is none."""
        self._link = link
        if link is None:
            self._changed.clear()
        else:
            self._changed.set()

    async def get(self) -> Link:
        """The connection, once there is one."""
        while self._link is None:
            await self._changed.wait()
        return self._link


class Workshop:
    """Takes messages, runs them one after the other, and leaves the answers in the outbox."""

    def __init__(
        self,
        home: Path,
        offers: Mapping[str, Offer],
        *,
        cache: ObjectCache,
        outbox: Outbox,
        child: TrainingChild,
        linked: Linked,
        changed: Callable[[], None],
    ) -> None:
        self._state, self._offers = home / "state", offers
        self._cache, self._outbox, self._child, self._linked = cache, outbox, child, linked
        self._changed = changed  # called when the outbox or what is held has changed
        self._queue: deque[Held] = deque()
        self._arrived = asyncio.Event()
        self._current: Held | None = None
        self._task: asyncio.Task[None] | None = None
        _forget_old_runs(self._state)

    def held(self) -> list[str]:
        """Ids of the messages that wait or are worked on."""
        current = [self._current] if self._current else []
        return [item.work.message_id for item in (*current, *self._queue)]

    def take(self, work: Work) -> None:
        """Accept a message, unless it is here already; refuse it with a failure for an answer."""
        message_id = work.message_id
        if not is_message_id(message_id):
            log.warning("the server sent a message whose id is not possible; passed over")
            return
        if message_id in self.held() or message_id in self._outbox.waiting():
            return
        if (reason := self._objection(work)) is not None:
            about = {"message_id": message_id, "run": work.run_id}
            log.warning("message %s refused: %s", message_id, reason, extra=about)
            COUNTED.add("fedge_agent_messages_total", "refused")
            self._finish(message_id, failure(reason, LOAD_FAILED))
            return
        seconds = work.seconds_left if 0 <= work.seconds_left <= MAX_SECONDS else MAX_SECONDS  # NaN neither
        deadline = asyncio.get_running_loop().time() + seconds
        self._queue.append(Held(work, deadline))
        self._arrived.set()
        self._changed()

    def _objection(self, work: Work) -> str | None:
        """Why this device does not do it. What the server names is compared, and never imported or opened."""
        offer = self._offers.get(work.task)
        if offer is None:
            return f"task {work.task[:100]!r} is not offered here; this device offers {sorted(self._offers)}"
        if work.task_digest != offer.digest:
            return (
                f"task {work.task!r}: its digest on this device is {offer.digest}, the server's is "
                f"{work.task_digest[:64]!r}; bring both to the same code"
            )
        if len(self._queue) >= MAX_WAITING:
            return f"{len(self._queue)} messages wait already"
        return None

    def cancel(self, message_id: str) -> None:
        """Nobody waits for this answer any more."""
        if self._current and self._current.work.message_id == message_id and self._task:
            self._task.cancel()
            return
        self._queue = deque(item for item in self._queue if item.work.message_id != message_id)
        if is_message_id(message_id):
            self._outbox.drop(message_id)
        self._changed()

    async def run(self) -> None:
        """Work through the messages, for ever."""
        while True:
            while not self._queue:
                self._arrived.clear()
                await self._arrived.wait()
            self._current = self._queue.popleft()
            self._task = asyncio.create_task(self._process(self._current))
            try:
                await asyncio.wait([self._task])
            except asyncio.CancelledError:
                self._task.cancel()
                await asyncio.wait([self._task])
                raise
            if not self._task.cancelled() and (error := self._task.exception()):
                raise error
            self._current = self._task = None
            self._changed()

    async def _process(self, held: Held) -> None:
        message_id = held.work.message_id
        started = time.monotonic()
        try:
            async with asyncio.timeout_at(held.deadline):
                result = await self._answer(held.work)
        except TimeoutError:
            log.warning("message %s: no answer before its deadline", message_id)
            COUNTED.add("fedge_agent_messages_total", "late")
            self._outbox.drop(message_id)
        except Closed:
            self._outbox.drop(message_id)
        except asyncio.CancelledError:
            log.info("message %s: cancelled", message_id)
            COUNTED.add("fedge_agent_messages_total", "cancelled")
            self._outbox.drop(message_id)
            raise
        else:
            self._finish(message_id, _bounded(result, held.work.max_result_bytes))
            failed = result.HasField("failure")
            COUNTED.add("fedge_agent_messages_total", "failed" if failed else "done")
            how = f"failed: {result.failure.reason}" if failed else "done"
            seconds, kind = time.monotonic() - started, held.work.message_type
            about = {"message_id": message_id, "run": held.work.run_id, "seconds": round(seconds, 3)}
            log.info("%s %s: %s in %.2f s", kind, message_id, how, seconds, extra=about)

    async def _answer(self, work: Work) -> Result:
        """Fetch what the message needs and run it; what this device cannot do becomes a failure."""
        try:
            starting = asyncio.ensure_future(self._child.start())  # torch loads while the model travels
            try:
                async with self._cache.held(work.content.object, self._fetching(work)) as path:
                    await asyncio.shield(starting)
                    offer = self._offers[work.task]
                    run = hashlib.sha256(work.run_id.encode()).hexdigest()[:32]
                    job = Job(
                        node=offer.task.node_config(offer.digest),
                        object=str(path or ""),
                        answer=str(self._outbox.begin(work.message_id)),
                        state=str(self._state / run),
                    )
                    return await self._child.run(job, work.SerializeToString())
            finally:
                await asyncio.gather(starting, return_exceptions=True)
        except FedgeError as error:
            return failure(str(error))
        except Closed:
            raise
        except OSError as error:
            return failure(f"this device cannot do it ({error.strerror or error})")
        except Exception as error:  # one message must not end the agent, whatever is in it
            log.exception("message %s", work.message_id)
            return failure(f"this device cannot do it ({type(error).__name__}: {error})")

    def _fetching(self, work: Work) -> Callable[[int], AsyncGenerator[bytes, None]]:
        """The bytes of a message's object from an offset on, over as many connections as it takes."""

        async def fetch(offset: int) -> AsyncGenerator[bytes, None]:
            while True:
                link = await self._linked.get()
                try:
                    sent = link.fetch(work.message_id, work.content.object, offset)
                    async with aclosing(sent) as chunks:
                        async for data in chunks:
                            offset += len(data)
                            yield data
                    return
                except grpc.RpcError as error:
                    if error.code() in _GONE:
                        log.info("message %s: %s", work.message_id, said(error))
                        raise Closed from error
                except ConnectionError:
                    pass
                await asyncio.sleep(RETRY_S)  # the connection may be gone without our knowing it yet

        return fetch

    def _finish(self, message_id: str, result: Result) -> None:
        if not result.content.object.size and result.seconds < CHEAP_S:
            # After a crash the hub sends the message again: that costs less than two syncs of the disk.
            self._outbox.put_in_memory(message_id, result)
            self._changed()
            return
        try:
            self._outbox.put(message_id, result)
        except (FedgeError, OSError) as error:
            log.warning("message %s: its answer cannot be kept (%s)", message_id, error)
            self._outbox.put_in_memory(
                message_id, failure(f"this device's disk refuses the answer ({error})")
            )
        self._changed()


def _bounded(result: Result, maximum: int) -> Result:
    """The answer, or a failure where the server would refuse its size."""
    rest = len(result.SerializeToString())
    if rest > MAX_MESSAGE_BYTES - 1024:
        return failure(f"the answer has {rest} bytes without tensors; a message holds {MAX_MESSAGE_BYTES}")
    if (size := result.content.object.size) > maximum:
        return failure(f"the answer's tensors take {size} bytes; the run allows {maximum}")
    return result


def _forget_old_runs(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for path in folder.iterdir():
        if path.stat().st_mtime < time.time() - KEEP_STATE_S:
            shutil.rmtree(path, ignore_errors=True)
