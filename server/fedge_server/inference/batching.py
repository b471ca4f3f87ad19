"""Requests that come at about the same time go through a model together.

A batch is closed when it is full, or a bounded time after its first request; while the model runs, the next
one gathers. A request whose caller has gone is dropped before it costs anything. (Crankshaw et al. 2017,
Clipper: A Low-Latency Online Prediction Serving System, section 4.3: adaptive batching with delay.)
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedge.errors import BusyError, FedgeError
from fedge_server.inference.limits import Limits

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]
Run = Callable[[Array], Float32]
"""A batch (B, *spec.shape) to probabilities (B, classes); called in a thread, by one caller at a time."""


@dataclass(slots=True, eq=False)
class _Request:
    x: Array  # (B, *spec.shape)
    answer: asyncio.Future[Float32]


class Batcher:
    """One model's queue; of one event loop. It keeps a task only while something waits.

    Args:
        run: the model.
        executor: its threads.
        limits: batch_examples, batch_wait_s and waiting_examples of them.
    """

    def __init__(self, run: Run, executor: Executor, limits: Limits) -> None:
        self._run, self._executor, self._limits = run, executor, limits
        self._requests: deque[_Request] = deque()
        self._waiting = 0  # examples
        self._full = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.batches = 0  # that have been run

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing runs."""
        return self._task is None

    @property
    def waiting(self) -> int:
        """Examples that wait for the next batches."""
        return self._waiting

    async def ask(self, x: Array) -> Float32:
        """The probabilities (B, classes) of x; cancel it to give up.

        Raises:
            BusyError: too much waits already.
            FedgeError: the model fails on x.
        """
        if self._waiting + len(x) > self._limits.waiting_examples:
            raise BusyError(f"{self._waiting} examples wait for this model already; ask again later")
        request = _Request(x, asyncio.get_running_loop().create_future())
        self._requests.append(request)
        self._waiting += len(x)
        if self._waiting >= self._limits.batch_examples:
            self._full.set()
        if self._task is None:
            self._task = asyncio.create_task(self._work())
        return await request.answer

    async def _work(self) -> None:
        try:
            while self._requests:
                await self._gather()
                if batch := self._next():
                    await self._answer(batch)
        finally:
            self._task = None

    async def _gather(self) -> None:
        """Give others a moment to come, unless enough are there already."""
        if self._waiting < self._limits.batch_examples and self._limits.batch_wait_s > 0:
            self._full.clear()
            try:
                async with asyncio.timeout(self._limits.batch_wait_s):
                    await self._full.wait()
            except TimeoutError:
                pass

    def _next(self) -> list[_Request]:
        """The first requests that fit into a batch, at least one; those given up are dropped."""
        batch: list[_Request] = []
        examples = 0
        while self._requests:
            first = self._requests[0]
            if batch and examples + len(first.x) > self._limits.batch_examples:
                break
            self._requests.popleft()
            self._waiting -= len(first.x)
            if not first.answer.done():  # else its caller has gone
                batch.append(first)
                examples += len(first.x)
        return batch

    async def _answer(self, batch: list[_Request]) -> None:
        """Run a batch; where it fails, each request by itself, so that none suffers from another."""
        try:
            rows = await self._rows(np.concatenate([request.x for request in batch]))
        except FedgeError as error:
            if len(batch) == 1:
                _fail(batch[0], error)
                return
            for request in batch:
                await self._answer([request])
            return
        start = 0
        for request in batch:
            if not request.answer.done():
                request.answer.set_result(rows[start : start + len(request.x)])
            start += len(request.x)

    async def _rows(self, x: Array) -> Float32:
        self.batches += 1
        step = self._limits.batch_examples  # one request may be larger than a batch
        loop = asyncio.get_running_loop()
        parts = []
        for i in range(0, len(x), step):
            try:
                found = await loop.run_in_executor(self._executor, self._run, x[i : i + step])
            except FedgeError:
                raise
            except Exception as error:  # a model is foreign code; its request must get an answer
                raise FedgeError(f"model: fails ({type(error).__name__})") from error
            if not np.isfinite(found).all():
                raise FedgeError("model: gives NaN or infinite probabilities for this input")
            parts.append(found)
        return np.concatenate(parts)


def _fail(request: _Request, error: FedgeError) -> None:
    if not request.answer.done():
        request.answer.set_exception(error)
