"""A database that refuses for a while: rounds go on once it is back, and nothing waits for ever."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from fedge.errors import FedgeError
from fedge.wire.v1 import link_pb2 as link
from fedge_server.hub import exchange


def refuse_once(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[str]:
    """The next call of a method raises; returns what was refused."""
    real, refused = getattr(owner, name), []

    def once(*arguments: Any) -> Any:
        if not refused:
            refused.append(name)
            raise FedgeError("database: locked")
        return real(*arguments)

    monkeypatch.setattr(owner, name, once)
    return refused


@pytest.mark.slow
def test_a_device_that_is_gone_fails_its_messages_also_after_the_database_refused_once(
    hub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "RETRY_S", 0.05)

    async def scenario(rig: Any) -> None:
        device = rig.device()
        await rig.run()
        refused = refuse_once(monkeypatch, rig.registry.queue, "answer")
        await rig.push("m1", to=device)
        assert (await rig.all_replies("m1"))["m1"].failure.code == 5
        assert refused == ["answer"]

    hub(scenario, offline_grace_s=0.1)


def test_an_answer_counts_though_its_traffic_cannot_be_written_down_yet(
    hub: Any, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(rig: Any) -> None:
        device = rig.device()
        stream = await device.welcome()
        await rig.run()
        await rig.push("m1", to=device)
        await stream.work()
        refused = refuse_once(monkeypatch, rig.registry.queue, "traffic")
        reply = await tools.submit(device.stub(), "m1", tools.answer_of(b"x" * 10), b"x" * 10)
        assert reply.outcome == link.SubmitReply.ACCEPTED
        assert refused == ["traffic"]
        assert (await rig.close_messages("m1")).bytes_up == 10  # written the next time

    hub(scenario)


def test_messages_that_are_pushed_twice_at_once_leave_nothing_behind(hub: Any, tools: Any) -> None:
    async def scenario(rig: Any) -> None:
        device = rig.device()
        stream = await device.welcome()
        await rig.run()
        await asyncio.gather(*(rig.push("m1", to=device) for _ in range(3)))
        await stream.work()
        reply = await tools.submit(device.stub(), "m1", tools.answer_of())
        assert reply.outcome == link.SubmitReply.ACCEPTED
        assert (rig.hub.exchange._contents, rig.hub.exchange._uses) == ({}, {})

    hub(scenario)


def test_a_message_that_the_database_has_closed_ends_here_with_its_late_answer(hub: Any, tools: Any) -> None:
    async def scenario(rig: Any) -> None:
        device = rig.device()
        stream = await device.welcome()
        await rig.run()
        await rig.push("m1", to=device)
        await stream.work()
        rig.registry.queue.expire(["m1"])
        reply = await tools.submit(device.stub(), "m1", tools.answer_of())
        assert reply.outcome == link.SubmitReply.TOO_LATE
        assert rig.hub.exchange.flight("m1") is None
        assert await rig.all_replies("m1") == {}

    hub(scenario)
