from __future__ import annotations

import asyncio
import json
import stat
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from fedge.wire import WIRE_VERSION
from fedge.wire.inference import read_answers, write_examples
from fedge.wire.v1 import inference_pb2 as pb
from fedge.wire.v1.inference_pb2_grpc import InferenceStub
from fedge_client.serving.holder import Holder

OPTIONS = (("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1))


def request(x: Any = None, **values: Any) -> pb.InferRequest:
    if x is not None:
        values["examples"] = write_examples(x)
    return pb.InferRequest(wire_version=WIRE_VERSION, **values)


def test_examples_files_and_text_are_answered_and_the_model_is_described(
    up: Any, runtime_of: Any, tools: Any
) -> None:
    async def scenario() -> None:
        async with up(Holder(runtime_of(4, answer=1)), grpc=True) as served:
            path = Path(served.listening.grpc.removeprefix("unix:"))
            assert stat.S_IMODE(path.stat().st_mode) == 0o660
            async with grpc.aio.insecure_channel(served.listening.grpc, options=OPTIONS) as channel:
                stub = InferenceStub(channel)
                reply = await stub.Infer(request(np.zeros((3, 8, 8), np.uint8)))
                assert (reply.version, len(reply.model), [a.label for a in reply.answers]) == (
                    4,
                    64,
                    ["one"] * 3,
                )
                assert read_answers(reply, 3, tools.images).argmax(1).tolist() == [1, 1, 1]
                csv = pb.InferFile(kind="csv", data=b"1,2")
                with pytest.raises(grpc.aio.AioRpcError, match="this model takes an image"):
                    await stub.Infer(request(file=csv))
                described = await stub.Describe(pb.DescribeRequest(wire_version=WIRE_VERSION))
                assert (described.version, json.loads(described.spec)) == (4, tools.images.to_json())

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("asked", "code"),
    [
        (pb.InferRequest(wire_version=WIRE_VERSION), "INVALID_ARGUMENT"),
        (pb.InferRequest(wire_version=0, text="x"), "INVALID_ARGUMENT"),
        (request(text="x"), "INVALID_ARGUMENT"),
        (request(np.zeros((8, 8), np.float32)), "INVALID_ARGUMENT"),
        (request(examples=pb.InferExamples(dtype="object", shape=[1], data=b"x")), "INVALID_ARGUMENT"),
        (
            request(examples=pb.InferExamples(dtype="uint8", shape=[2**40, 8, 8], data=b"x" * 64)),
            "INVALID_ARGUMENT",
        ),
        (
            request(examples=pb.InferExamples(dtype="uint8", shape=[0, 2**63, 8], data=b"")),
            "INVALID_ARGUMENT",
        ),
        (request(np.zeros((5_000_000,), np.uint8)), "RESOURCE_EXHAUSTED"),
        (request(np.zeros((8, 8), np.uint8), version=9), "FAILED_PRECONDITION"),
    ],
)
def test_what_does_not_fit_gets_a_clear_status(
    asked: pb.InferRequest, code: str, up: Any, runtime_of: Any
) -> None:
    async def scenario() -> None:
        async with (
            up(Holder(runtime_of()), grpc=True) as served,
            grpc.aio.insecure_channel(served.listening.grpc, options=OPTIONS) as channel,
        ):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await InferenceStub(channel).Infer(asked)
            assert refused.value.code().name == code
            await InferenceStub(channel).Infer(request(np.zeros((8, 8), np.uint8)))

    asyncio.run(scenario())
