"""Devices ask the global model over mutual TLS: answers, versions, refusals, revocation, limits."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import grpc
import numpy as np
import pytest

from fedge.errors import AbsentError
from fedge.fitting import fit
from fedge.inference import CompactModel
from fedge.spec import Spec
from fedge.wire import WIRE_VERSION
from fedge.wire.inference import read_answers, write_examples
from fedge.wire.v1 import inference_pb2 as pb
from fedge_server.inference.models import Loaded

X = np.zeros((3, 8, 8), np.uint8)


def request(x: Any = X, **values: Any) -> pb.InferRequest:
    if x is not None:
        values["examples"] = write_examples(x)
    return pb.InferRequest(**{"wire_version": WIRE_VERSION, **values})


@pytest.fixture
def load(tools: Any) -> Any:
    """Release v answers label v % 3; there are releases 1 to 5, for tier micro."""

    def load(version: int) -> Loaded:
        if version > 5:
            raise AbsentError(f"there is no release {version}")
        data = tools.constant_model(version % 3)
        model = CompactModel(data, tools.images)
        run = lambda x: model.run(x)[1]  # noqa: E731
        return Loaded(
            version, str(version) * 64, "digits", tools.images, frozenset(["micro"]), run, len(data)
        )

    return load


def test_a_device_is_answered_by_the_release_that_it_names_or_the_newest(
    site: Any, load: Any, tools: Any
) -> None:
    async def scenario() -> None:
        async with site.up(load, lambda tier: 5) as models, site.stub(site.device()) as stub:
            for version, answered in ((1, 1), (4, 4), (0, 5)):
                reply = await stub.Infer(request(version=version))
                assert (reply.version, reply.model) == (answered, str(answered) * 64)
                assert read_answers(reply, 3, tools.images).argmax(1).tolist() == [answered % 3] * 3
            described = await stub.Describe(pb.DescribeRequest(wire_version=WIRE_VERSION))
            assert (described.version, described.task) == (5, "digits")
            assert Spec.from_json(json.loads(described.spec)) == tools.images
            assert models.versions == (1, 4, 5)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("asked", "code", "said"),
    [
        (request(version=9), "NOT_FOUND", "no release 9"),
        (request(wire_version=0), "FAILED_PRECONDITION", "wire version 0"),
        (request(None), "INVALID_ARGUMENT", "takes examples"),
        (request(None, text="hello"), "INVALID_ARGUMENT", "takes examples"),
        (request(None, file=pb.InferFile(kind="png", data=b"x")), "INVALID_ARGUMENT", "takes examples"),
        (request(np.zeros((3, 8, 8), np.float32)), "INVALID_ARGUMENT", "whole numbers"),
        (request(np.zeros((3, 9, 8), np.uint8)), "INVALID_ARGUMENT", "has shape"),
        (request(np.zeros((257, 8, 8), np.uint8)), "INVALID_ARGUMENT", "257 examples"),
        (request(np.zeros((5_000_000,), np.uint8)), "RESOURCE_EXHAUSTED", "larger than max"),
        (
            request(None, examples=pb.InferExamples(dtype="O", shape=[1], data=b"x")),
            "INVALID_ARGUMENT",
            "dtype",
        ),
        (
            request(None, examples=pb.InferExamples(dtype="uint8", shape=[2**40, 8, 8], data=bytes(64))),
            "INVALID_ARGUMENT",
            "and 64 have come",
        ),
        (
            request(None, examples=pb.InferExamples(dtype="uint8", shape=[0, 2**63], data=b"")),
            "INVALID_ARGUMENT",
            "holds nothing",
        ),
        (
            request(None, examples=pb.InferExamples(dtype="uint8", shape=[1] * 30, data=b"x")),
            "INVALID_ARGUMENT",
            "30 dimensions",
        ),
    ],
)
def test_what_does_not_fit_gets_a_clear_status_and_others_are_served(
    asked: pb.InferRequest, code: str, said: str, site: Any, load: Any
) -> None:
    async def scenario() -> None:
        async with site.up(load), site.stub(site.device()) as stub:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.Infer(asked)
            assert (refused.value.code().name, said in refused.value.details()) == (code, True), refused.value
            await stub.Infer(request())

    asyncio.run(scenario())


def test_a_revoked_device_fails_at_its_next_call_on_a_live_connection(site: Any, load: Any) -> None:
    async def scenario() -> None:
        device = site.device()
        async with site.up(load), site.stub(device) as stub:
            await stub.Infer(request())
            site.registry.devices.revoke(device.id, "stolen")
            for call in (stub.Infer(request()), stub.Describe(pb.DescribeRequest(wire_version=WIRE_VERSION))):
                with pytest.raises(grpc.aio.AioRpcError, match="stolen") as refused:
                    await call
                assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED

    asyncio.run(scenario())


def test_a_stranger_and_a_device_of_another_tier_get_nothing(site: Any, load: Any) -> None:
    async def scenario() -> None:
        async with site.up(load):
            async with site.stub(site.device("macro")) as stub:
                with pytest.raises(grpc.aio.AioRpcError, match="nothing for tier 'macro'") as refused:
                    await stub.Infer(request(version=1))
                assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
            stranger = site.device()
            stranger.key_pem = stranger.certificate = None
            async with site.stub(stranger) as stub:
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await stub.Infer(request())
                assert refused.value.code() is grpc.StatusCode.UNAVAILABLE  # TLS itself refuses

    asyncio.run(scenario())


@pytest.mark.slow
def test_one_device_cannot_fill_the_queue_and_a_late_answer_is_told_in_time(site: Any, load: Any) -> None:
    go, running = threading.Event(), threading.Semaphore(0)

    def slow(version: int) -> Loaded:
        found = load(version)
        real = found.run

        def run(x: Any) -> Any:
            running.release()
            assert go.wait(20)
            return real(x)

        return Loaded(version, found.model, "digits", found.spec, found.tiers, run, 1)

    async def scenario() -> None:
        async with (
            site.up(slow, in_flight=2, deadline_s=30.0) as models,
            site.stub(site.device()) as first,
            site.stub(site.device()) as second,
        ):
            waiting = [asyncio.ensure_future(first.Infer(request(version=1)))]
            assert await asyncio.to_thread(running.acquire, timeout=20)
            waiting.append(asyncio.ensure_future(first.Infer(request(version=1))))
            batcher = (await models.get(1)).batcher
            while batcher.waiting < 3:
                await asyncio.sleep(0.01)
            with pytest.raises(grpc.aio.AioRpcError, match="2 requests of this device") as refused:
                await first.Infer(request(version=1), timeout=10)
            assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            with pytest.raises(grpc.aio.AioRpcError) as late:
                await second.Infer(request(version=1), timeout=0.2)
            assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            go.set()
            assert [(await each).version for each in waiting] == [1, 1]
            assert (await second.Infer(request(version=1))).version == 1

    asyncio.run(scenario())


def test_nan_is_a_missing_value_of_a_table_and_refused_in_an_image() -> None:
    from fedge.errors import DataError

    nan = np.full((1, 2, 2), np.nan, np.float32)
    with pytest.raises(DataError, match="NaN in an image"):
        fit(nan, Spec("image", (2, 2), "float32", ("no", "yes")))
    assert np.isnan(fit(nan[0], Spec("features", (2,), "float32", ("no", "yes")))).all()
