"""The gRPC endpoint: `fedge.v1.Inference` on a local socket."""

from __future__ import annotations

import json
from typing import Any, Final, NoReturn

import grpc

from fedge.errors import (
    AbsentError,
    BusyError,
    DataError,
    FedgeError,
    FormatError,
    LateError,
)
from fedge.fitting import fit
from fedge.wire import OLDEST_WIRE_VERSION
from fedge.wire.inference import read_examples
from fedge.wire.v1 import inference_pb2 as pb
from fedge.wire.v1 import inference_pb2_grpc
from fedge_client.serving.answered import Answered
from fedge_client.serving.limits import Limits
from fedge_client.serving.service import Query, Service, file_query, model_of, text_query

_ENVELOPE_BYTES: Final = 64 * 1024  # of a message beside the input itself
_AGE_MS: Final = 60_000  # of a connection: then it is made anew, which ends a call that does not go on
_CODES: Final[tuple[tuple[type[FedgeError], grpc.StatusCode], ...]] = (
    (DataError, grpc.StatusCode.INVALID_ARGUMENT),
    (BusyError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (AbsentError, grpc.StatusCode.FAILED_PRECONDITION),
    (LateError, grpc.StatusCode.DEADLINE_EXCEEDED),
)


class LocalInferenceServicer(inference_pb2_grpc.InferenceServicer):
    """Answers programs of this device."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def Infer(self, request: pb.InferRequest, context: Any) -> pb.InferReply:  # noqa: N802
        """Answers of the installed variant."""
        try:
            query = _query(request, self._service.limits)
            found = await self._service.infer(query, context.time_remaining())
            if request.version not in (0, found.version):
                raise AbsentError(f"release {found.version} is installed, not {request.version}")
        except FedgeError as error:
            await _refuse(context, error)
        return pb.InferReply(
            version=found.version,
            model=found.model,
            answers=_answers(found),
            cloud_model=found.cloud_model,
        )

    async def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.DescribeReply:  # noqa: N802
        """What is installed."""
        try:
            with self._service.holder.lease() as runtime:
                return pb.DescribeReply(
                    version=runtime.release.version,
                    model=model_of(runtime),
                    task=runtime.release.task,
                    spec=json.dumps(runtime.spec.to_json(), separators=(",", ":")),
                )
        except FedgeError as error:
            await _refuse(context, error)


def _query(request: pb.InferRequest, limits: Limits) -> Query:
    if request.wire_version < OLDEST_WIRE_VERSION:
        raise DataError(
            f"wire version {request.wire_version}: this one speaks {OLDEST_WIRE_VERSION} and newer"
        )
    kind = request.WhichOneof("input")
    if kind == "file":
        return file_query(request.file.kind, request.file.data, limits)
    if kind == "text":
        return text_query(request.text)
    if kind == "examples":
        try:
            examples = read_examples(request.examples)
        except FormatError as error:
            raise DataError(str(error)) from error
        return lambda spec: fit(examples, spec)
    raise DataError("input: there is none; give examples, a file or a text")


def _answers(found: Answered) -> list[pb.InferAnswer]:
    return [
        pb.InferAnswer(
            label=p.label,
            confidence=p.confidence,
            probabilities=[p.probabilities[n] for n in found.labels],
            source=source,
            why=why,
        )
        for p, source, why in zip(found.predictions, found.route, found.why, strict=True)
    ]


async def _refuse(context: Any, error: FedgeError) -> NoReturn:
    code = next((code for kind, code in _CODES if isinstance(error, kind)), grpc.StatusCode.INTERNAL)
    await context.abort(code, str(error))
    raise AssertionError("abort raises")


def server_of(service: Service) -> Any:
    """A grpc.aio server of this service, without a port yet."""
    limits = service.limits
    longest = limits.request_bytes + _ENVELOPE_BYTES
    server = grpc.aio.server(
        options=(
            ("grpc.max_receive_message_length", longest),
            ("grpc.max_send_message_length", longest),
            ("grpc.max_metadata_size", 8 * 1024),
            ("grpc.max_concurrent_streams", 64),
            ("grpc.max_connection_idle_ms", _AGE_MS),
            ("grpc.max_connection_age_ms", _AGE_MS),
            ("grpc.max_connection_age_grace_ms", int(limits.read_s * 1000)),
            ("grpc.http2.bdp_probe", 0),
            ("grpc.http2.lookahead_bytes", 16 * 1024),
            ("grpc.so_reuseport", 0),
        ),
        # A message takes memory from when its call has begun: so many calls, and no more, begin.
        maximum_concurrent_rpcs=max(2 * limits.bodies_bytes // limits.request_bytes, 8),
    )
    inference_pb2_grpc.add_InferenceServicer_to_server(  # type: ignore[no-untyped-call]  # generated
        LocalInferenceServicer(service), server
    )
    return server
