"""`fedge.v1.Inference` for devices: who asks, whether it may, what fits, then the batch."""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, Protocol, TypeVar

import grpc

from fedge.errors import AbsentError, BusyError, DataError, FedgeError, ForbiddenError, FormatError, LateError
from fedge.fitting import fit
from fedge.spec import Spec
from fedge.wire import OLDEST_WIRE_VERSION
from fedge.wire.inference import read_examples, write_answers
from fedge.wire.v1 import inference_pb2 as pb
from fedge.wire.v1 import inference_pb2_grpc
from fedge_server.inference.limits import Limits
from fedge_server.inference.models import Entry, Models
from fedge_server.monitoring.metrics import INFERENCES

T = TypeVar("T")
_log = logging.getLogger("fedge.inference")

_CODES: tuple[tuple[type[FedgeError], grpc.StatusCode], ...] = (
    (DataError, grpc.StatusCode.INVALID_ARGUMENT),
    (FormatError, grpc.StatusCode.INVALID_ARGUMENT),
    (AbsentError, grpc.StatusCode.NOT_FOUND),
    (ForbiddenError, grpc.StatusCode.PERMISSION_DENIED),
    (BusyError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (LateError, grpc.StatusCode.DEADLINE_EXCEEDED),
)


class Caller(Protocol):
    """What the service needs of a device's row."""

    @property
    def id(self) -> str:
        """The device."""

    @property
    def tier(self) -> str:
        """Its class."""


class Admission(Protocol):
    """Who calls, and whether it may; the hub's gate is one."""

    async def admit(self, context: Any) -> tuple[Any, Caller]:
        """The caller's certificate and row; ends the call when it may not speak."""


class InferenceServicer(inference_pb2_grpc.InferenceServicer):
    """Serves Inference on a grpc.aio server.

    Args:
        gate: asked at each call, before anything of it is looked at.
        models: what answers.
        limits: of a request, and of a device.
    """

    def __init__(self, gate: Admission, models: Models, limits: Limits) -> None:
        self._gate, self._models, self._limits = gate, models, limits
        self._in_flight: Counter[str] = Counter()

    async def Infer(self, request: pb.InferRequest, context: Any) -> pb.InferReply:  # noqa: N802
        """Answers of the global model."""
        _, row = await self._gate.admit(context)
        return await _answered(self._infer(request, row, context), context)

    async def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.DescribeReply:  # noqa: N802
        """What answers."""
        _, row = await self._gate.admit(context)
        return await _answered(self._describe(request, row), context)

    async def _infer(self, request: pb.InferRequest, row: Caller, context: Any) -> pb.InferReply:
        with self._place(row.id):
            _check_version(request.wire_version)
            if request.WhichOneof("input") != "examples":
                raise FormatError("input: the cloud takes examples, as the model's raw arrays")
            left = context.time_remaining()
            limit = self._limits.deadline_s if left is None else min(left, self._limits.deadline_s)
            try:
                async with asyncio.timeout(limit):
                    entry = await self._entry(request.version, row)
                    x = _batch_of(request.examples, entry.loaded.spec, self._limits)
                    rows = await entry.batcher.ask(x)
            except TimeoutError as error:
                raise LateError(f"not answered within {limit:.3g} s") from error
        loaded = entry.loaded
        return pb.InferReply(
            version=loaded.version, model=loaded.model, answers=write_answers(rows, loaded.spec)
        )

    async def _describe(self, request: pb.DescribeRequest, row: Caller) -> pb.DescribeReply:
        with self._place(row.id):
            _check_version(request.wire_version)
            loaded = (await self._entry(request.version, row)).loaded
        spec = json.dumps(loaded.spec.to_json(), separators=(",", ":"))
        return pb.DescribeReply(version=loaded.version, model=loaded.model, task=loaded.task, spec=spec)

    async def _entry(self, version: int, row: Caller) -> Entry:
        wanted = version or await asyncio.to_thread(self._models.newest, row.tier)
        entry = await self._models.get(wanted)
        if row.tier not in entry.loaded.tiers:
            raise ForbiddenError(f"release {wanted} has nothing for tier {row.tier!r}")
        return entry

    @contextmanager
    def _place(self, device_id: str) -> Iterator[None]:
        """A device asks a few things at a time: one cannot fill the queue for all."""
        if self._in_flight[device_id] >= self._limits.in_flight:
            raise BusyError(f"{self._limits.in_flight} requests of this device are open already")
        self._in_flight[device_id] += 1
        try:
            yield
        finally:
            self._in_flight[device_id] -= 1
            if not self._in_flight[device_id]:
                del self._in_flight[device_id]


def _check_version(version: int) -> None:
    if version < OLDEST_WIRE_VERSION:
        raise _VersionError(f"wire version {version}: this server speaks {OLDEST_WIRE_VERSION} and newer")


class _VersionError(FedgeError):
    """The caller speaks a version that is not served."""


def _batch_of(sent: pb.InferExamples, spec: Spec, limits: Limits) -> Any:
    batch = fit(read_examples(sent), spec)
    if not 1 <= len(batch) <= limits.max_examples:
        raise DataError(f"input: {len(batch)} examples; a request has 1 to {limits.max_examples}")
    return batch


async def _answered(work: Awaitable[T], context: Any) -> T:
    try:
        found = await work
        INFERENCES.labels("answered").inc()
        return found
    except _VersionError as error:
        await _refuse(context, grpc.StatusCode.FAILED_PRECONDITION, str(error))
    except FedgeError as error:
        for kind, code in _CODES:
            if isinstance(error, kind):
                await _refuse(context, code, str(error))
        _log.error("inference failed: %s", error)
        await _refuse(context, grpc.StatusCode.INTERNAL, "the model fails on this input")


async def _refuse(context: Any, code: grpc.StatusCode, details: str) -> NoReturn:
    INFERENCES.labels(code.name.lower()).inc()
    await context.abort(code, details)
    raise AssertionError("abort raises")
