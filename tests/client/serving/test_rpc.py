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


def test_over_http_and_grpc_each_answer_says_who_gave_it_and_why_and_health_how_the_cloud_is(
    tmp_path: Path, tools: Any, wire: Any
) -> None:
    """The variant's logits are its input; the cloud answers the second label, then is away."""
    from types import SimpleNamespace

    from fedge.inference import CompactModel
    from fedge.routing import Rule
    from fedge.spec import Spec
    from fedge_client.joint import BreakerSettings, CloudAnswer, CloudError, Joint, JointSettings
    from fedge_client.runtime import Runtime
    from fedge_client.serving.answered import Answered
    from fedge_client.serving.limits import Limits
    from fedge_client.serving.running import Address, listening

    spec = Spec("features", (2,), "float32", ("no", "yes"))
    model = tools.linear_model(spec, np.eye(2), np.zeros(2))
    entry, _ = tools.entry_of("micro", model)
    release = tools.release_of(3, (entry,), spec=spec)
    holder = Holder(Runtime(SimpleNamespace(release=release, entry=entry), CompactModel(model, spec)))
    told: list[Answered] = []
    counted: list[Answered] = []
    counter = SimpleNamespace(answered=counted.append)

    class Cloud:
        away = False

        async def ask(self, x: Any, spec: Spec, version: int, timeout_s: float) -> CloudAnswer:
            if self.away:
                raise CloudError("down", "no connection")
            return CloudAnswer(np.tile(np.array([0.1, 0.9], np.float32), (len(x), 1)), version, "c" * 64)

    async def scenario() -> None:
        cloud = Cloud()
        settings = JointSettings(
            rule=Rule("confidence", 0.2), deadline_s=20.0, breaker=BreakerSettings(1, 60.0, 60.0)
        )
        joint = Joint(holder, cloud, settings)
        where = [Address.parse(f"unix:{tmp_path}/{name}.sock") for name in ("http", "grpc")]
        async with listening(tmp_path, holder, Limits(), *where, told.append, counter, joint) as up:
            reader, writer = await asyncio.open_unix_connection(up.http.removeprefix("unix:"))

            async def asked(request: bytes) -> Any:
                writer.write(request)
                return (await wire.read_reply(reader)).json

            both = wire.post(b"8,0\n0.1,0\n", "text/csv")
            found = await asked(both)
            assert [(p["source"], p["why"], p["label"]) for p in found["predictions"]] == [
                ("device", "sure", "no"),
                ("cloud", "asked", "yes"),
            ]
            assert (found["release"], found["cloud_model"]) == (3, "c" * 64)
            cloud.away = True
            found = await asked(both)
            assert [p["why"] for p in found["predictions"]] == ["sure", "down"]
            assert "cloud_model" not in found
            async with grpc.aio.insecure_channel(up.grpc, options=OPTIONS) as channel:
                reply = await InferenceStub(channel).Infer(request(np.array([[0.1, 0.0]], np.float32)))
            assert [(a.source, a.why, a.label) for a in reply.answers] == [("device", "open", "no")]
            health = await asked(b"GET /v1/health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert health["cloud"] == {
                "breaker": "open",
                "examples": {"asked": 1, "down": 1, "open": 1, "sure": 2},
            }
            writer.close()
        await joint.close()
        assert [(each.route, each.why) for each in counted] == [(each.route, each.why) for each in told]
        assert [p.label for p in told[0].own] == ["no", "no"]  # what the device itself would have said
        assert (told[0].route, told[0].x.shape) == (("device", "cloud"), (2, 2))

    asyncio.run(scenario())
