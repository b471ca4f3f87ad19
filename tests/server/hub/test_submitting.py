"""Answers that are sent twice, or too many at once."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import grpc
import pytest

from fedge.wire.v1 import link_pb2 as link
from fedge_server.hub.submitting import AT_ONCE


@pytest.mark.slow
def test_an_answer_sent_again_while_the_first_is_committed_keeps_its_object(hub: Any, tools: Any) -> None:
    async def scenario(rig: Any) -> None:
        device = rig.device()
        stream = await device.welcome()
        await rig.run()
        await rig.push("m1", to=device)
        await stream.work()
        real, started, go = rig.registry.queue.answer, threading.Event(), threading.Event()

        def slow(answers: Any) -> Any:
            started.set()
            go.wait(10)
            return real(answers)

        rig.registry.queue.answer = slow
        data = b"x" * 5000
        first = asyncio.create_task(tools.submit(device.stub(), "m1", tools.answer_of(data), data))
        await asyncio.to_thread(started.wait, 10)
        # The device takes the connection for broken and sends the same answer once more.
        second = asyncio.create_task(tools.submit(device.stub(), "m1", tools.answer_of(data), data))
        await asyncio.sleep(0.2)  # it does not matter how far the second has come
        go.set()
        outcomes = [(await reply).outcome for reply in (first, second)]
        assert outcomes == [link.SubmitReply.ACCEPTED] * 2
        (reply,) = [reply async for reply in rig.replies("m1")]
        folder = rig.home.spool("run-1")
        assert (folder / reply.spool).read_bytes() == data
        assert [path.name for path in folder.iterdir()] == [reply.spool]

    hub(scenario)


def test_a_device_that_sends_many_answers_at_once_takes_no_more_than_its_share(hub: Any, tools: Any) -> None:
    async def scenario(rig: Any) -> None:
        device = rig.device()
        await device.welcome()
        calls = [device.stub().Submit() for _ in range(AT_ONCE + 1)]
        done, waiting = await asyncio.wait(
            [asyncio.ensure_future(call.code()) for call in calls], return_when=asyncio.FIRST_COMPLETED
        )
        assert [code.result() for code in done] == [grpc.StatusCode.RESOURCE_EXHAUSTED]
        assert len(waiting) == AT_ONCE
        for call in calls:
            call.cancel()

    hub(scenario)
