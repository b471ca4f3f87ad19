"""The cloud's Inference service over gRPC and mutual TLS, from a device's side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Protocol

import grpc
import grpc.aio
import numpy.typing as npt

from fedge.errors import FormatError
from fedge.spec import Spec
from fedge.wire import MAX_MESSAGE_BYTES, PING_MS, WIRE_VERSION
from fedge.wire.inference import read_answers, write_examples
from fedge.wire.v1 import inference_pb2 as pb
from fedge.wire.v1.inference_pb2_grpc import InferenceStub
from fedge_client.joint.joint import CloudAnswer, CloudError, Failure

_OPTIONS: Final = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", PING_MS),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.enable_retries", 0),  # a second attempt would come too late
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1_000),  # how often to try at all is the breaker's business
)
_WHY: Final[dict[grpc.StatusCode, Failure]] = {
    grpc.StatusCode.DEADLINE_EXCEEDED: "late",
    grpc.StatusCode.RESOURCE_EXHAUSTED: "busy",
    grpc.StatusCode.UNAVAILABLE: "down",
    grpc.StatusCode.CANCELLED: "down",
    grpc.StatusCode.INTERNAL: "down",
    grpc.StatusCode.UNKNOWN: "down",
    grpc.StatusCode.UNIMPLEMENTED: "refused",
    grpc.StatusCode.NOT_FOUND: "version",  # it has not, or not any more, what this device runs
}


class Credentials(Protocol):
    """What a connection is made with; the agent's identity has it."""

    @property
    def link_address(self) -> str:
        """host:port of the server's link."""

    @property
    def bundle(self) -> bytes:
        """The authorities that may have signed the server's certificate, PEM."""

    @property
    def key_pem(self) -> bytes:
        """The device's private key."""

    @property
    def certificate(self) -> bytes:
        """The device's certificate, PEM."""


class GrpcCloud:
    """A connection that is made at the first question, and anew when the device's certificate is another.

    Args:
        credentials: of the moment; asked at each question.
    """

    def __init__(self, credentials: Callable[[], Credentials]) -> None:
        self._credentials = credentials
        self._shown: tuple[str, bytes, bytes] | None = None
        self._channel: Any = None
        self._stub: Any = None

    async def close(self) -> None:
        """End the connection."""
        if self._channel is not None:
            await self._channel.close()
            self._channel = self._shown = None

    async def ask(self, x: npt.NDArray[Any], spec: Spec, version: int, timeout_s: float) -> CloudAnswer:
        """The global model's answer to a batch.

        Args:
            x: raw examples (B, *spec.shape), as the spec says.
            spec: of the release.
            version: of the release that is to answer.
            timeout_s: that it is waited for.

        Raises:
            CloudError: no answer in time, or one that is none.
        """
        await self._connect()
        request = pb.InferRequest(wire_version=WIRE_VERSION, version=version, examples=write_examples(x))
        try:
            reply: pb.InferReply = await self._stub.Infer(request, timeout=timeout_s)
            if reply.version != version:
                raise CloudError("version", f"answer: from release {reply.version}, asked was {version}")
            return CloudAnswer(read_answers(reply, len(x), spec), reply.version, reply.model[:64])
        except FormatError as error:
            raise CloudError("garbage", str(error)) from error
        except grpc.RpcError as error:
            code = error.code()
            raise CloudError(_WHY.get(code, "refused"), f"{code.name}: {error.details()}") from error

    async def _connect(self) -> None:
        found = self._credentials()
        shown = (found.link_address, found.certificate, found.bundle)
        if shown == self._shown:
            return
        old = self._channel
        credentials = grpc.ssl_channel_credentials(found.bundle, found.key_pem, found.certificate)
        self._channel = grpc.aio.secure_channel(found.link_address, credentials, options=_OPTIONS)
        self._stub = InferenceStub(self._channel)  # type: ignore[no-untyped-call]  # generated
        self._shown = shown
        if old is not None:
            await old.close(_OLD_S)


_OLD_S: Final = 1.0  # that questions over the old connection may still take
