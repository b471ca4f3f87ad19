"""From request to answer: admitted or refused at once, decoded and answered in a thread, by its deadline."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, Protocol

import numpy.typing as npt

from fedge.errors import BusyError, DataError, FormatError, LateError
from fedge.fitting import fit
from fedge.spec import Spec
from fedge_client.inputs import decode, read_text
from fedge_client.joint.joint import Joint, Local
from fedge_client.runtime import Prediction, Runtime
from fedge_client.serving.answered import Answered
from fedge_client.serving.holder import Holder
from fedge_client.serving.limits import Limits

Array = npt.NDArray[Any]
MAX_PROBABILITIES: Final = 100_000  # of one answer: a model of many classes takes fewer examples
Query = Callable[[Spec], Array]
"""The examples of a request for a model of this spec; called in a thread, raises DataError or FormatError."""

FILES = frozenset(
    ("png", "jpg", "jpeg", "bmp", "gif", "tif", "tiff", "webp", "pgm", "ppm", "npy", "csv", "json", "txt")
)  # `.npz` is left out: it may unpack to a thousand times its length


class Counter(Protocol):
    """Counts what becomes of requests."""

    def answered(self, found: Answered) -> None:
        """A request that was answered; called in a thread, perhaps after its answer was given."""

    def failed(self) -> None:
        """A request that fits got no answer: refused, late, or the model failed on it."""


def file_query(kind: str, data: bytes, limits: Limits) -> Query:
    """A request that is a file's bytes.

    Raises:
        DataError: of no kind that is read here.
    """
    if kind not in FILES:
        raise DataError(f"{kind[:40]!r} is no kind of file that is read here; it must be one of {_few()}")
    return lambda spec: decode(data, f".{kind}", spec, max_pixels=limits.pixels)


def text_query(text: str) -> Query:
    """A request that is a text."""
    return lambda spec: read_text(text, spec)


def _few() -> str:
    return ", ".join(sorted(FILES))


class Service:
    """Answers requests from the model that a holder has; of one event loop.

    Args:
        holder: the model that answers; whoever installs swaps it.
        limits: of requests.
        told: of each answer that was in time, in the event loop.
        counter: of what becomes of requests; None: it is not counted.
        joint: asks the cloud where the device is not sure; None: nobody is asked.
    """

    def __init__(
        self,
        holder: Holder[Runtime],
        limits: Limits,
        told: Callable[[Answered], None] = lambda _: None,
        counter: Counter | None = None,
        joint: Joint | None = None,
    ) -> None:
        self.holder, self.limits, self._told, self._counter = holder, limits, told, counter
        self.joint = joint
        self._executor = ThreadPoolExecutor(limits.workers, thread_name_prefix="serving")
        self._open = 0  # requests that wait or are at work, those included whose caller has gone
        self._uncounted: deque[Answered] = deque()
        self.answered = self.refused = self.late = 0

    @property
    def open(self) -> int:
        """Requests that wait or are at work."""
        return self._open

    def close(self) -> None:
        """End the threads; what is at work is waited for."""
        self._executor.shutdown(cancel_futures=True)
        while self._uncounted:
            self._count()

    async def infer(self, query: Query, deadline_s: float | None = None) -> Answered:
        """The answer to a query: the device's, or the cloud's where that is asked and answers in time.

        Raises:
            BusyError: too many requests are open.
            LateError: it was not answered by its deadline.
            AbsentError: no model is installed.
            DataError, FormatError: the input does not fit, or the model fails on it.
        """
        limits = self.limits
        if self._open >= limits.workers + limits.queue:
            self.refused += 1
            self._failed()
            raise BusyError(f"{self._open} requests are open; ask again later")
        seconds = limits.deadline_s if deadline_s is None else min(deadline_s, limits.deadline_s)
        began = time.monotonic()
        future = asyncio.get_running_loop().run_in_executor(
            self._executor, self._work, query, began + seconds
        )
        self._open += 1
        future.add_done_callback(self._ended)
        try:
            async with asyncio.timeout(seconds):
                local = await asyncio.shield(future)  # a thread cannot be stopped: it looks at the time
        except (TimeoutError, LateError) as error:
            self.late += 1
            self._failed()
            raise LateError(f"not answered within {seconds:.3g} s") from error
        except FormatError:
            self._failed()
            raise
        if self.joint is None:
            answers = local.alone("alone")
        else:
            wait_s = seconds if deadline_s is not None else min(self.joint.deadline_s, seconds)
            answers = await self.joint.complete(local, began + wait_s)
        self.answered += 1
        found = Answered.of(local, answers, time.monotonic() - began)
        self._told(found)
        if self._counter is not None:
            self._uncounted.append(found)
            self._executor.submit(self._count)  # before requests that wait: no more than these pile up
        return found

    def _count(self) -> None:
        if self._counter is not None:
            self._counter.answered(self._uncounted.popleft())

    def _failed(self) -> None:
        if self._counter is not None:
            self._counter.failed()

    def _ended(self, future: asyncio.Future[Local]) -> None:
        self._open -= 1
        if not future.cancelled():
            future.exception()  # seen: whoever asked may have gone

    def _work(self, query: Query, until: float) -> Local:
        _in_time(until)
        with self.holder.lease() as runtime:
            x = query(runtime.spec)
            batch = x[None] if x.shape == runtime.spec.shape else x  # (B, *spec.shape)
            most = max(min(self.limits.examples, MAX_PROBABILITIES // runtime.spec.classes), 1)
            if not 1 <= len(batch) <= most:
                raise DataError(f"holds {len(batch)} examples; a request has 1 to {most}")
            predictions: list[Prediction] = []
            for example in batch:
                _in_time(until)
                predictions += runtime.infer(example)
            _in_time(until)  # else it has been told as late
            return Local.of(runtime, fit(batch, runtime.spec), predictions)


def model_of(runtime: Runtime) -> str:
    """SHA-256 of the installed bytes that answer."""
    return str(runtime.installed.entry.installed_sha256)


def _in_time(until: float) -> None:
    if time.monotonic() > until:
        raise LateError("the deadline has passed")
