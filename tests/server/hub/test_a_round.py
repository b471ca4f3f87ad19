"""Messages go down, answers come up, and nothing is lost when the hub or a stream breaks."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

import grpc
import pytest

from fedge.wire.v1 import admin_pb2 as admin
from fedge.wire.v1 import link_pb2 as link

SELECTION = admin.Selection(task="digits", task_digest="d" * 64)


@pytest.mark.slow
def test_a_message_reaches_its_device_and_the_answer_its_run(hub: Any, tools: Any) -> None:
    model, update = bytes(range(256)) * 4000, b"u" * 700_000

    async def scenario(rig: Any) -> None:
        device = rig.device(tier="micro")
        stub = device.stub()
        stream = await device.connect(stub, tags=["north"])
        welcome = (await stream.read()).welcome
        assert (welcome.wire_version, welcome.device_id, welcome.tier) == (2, device.id, "micro")
        assert welcome.ca_bundle == rig.authority.bundle
        await rig.run()
        nodes = await rig.runs.Nodes(admin.NodesRequest(run_id="run-1", selection=SELECTION, at_least=1))
        assert list(nodes.node_ids) == [device.node_id]
        await rig.push("m1", to=device, data=model, max_result_bytes=700_000)
        replies = rig.replies("m1")
        work = await stream.work()
        assert (work.message_id, work.run_id, work.task, work.message_type) == (
            "m1",
            "run-1",
            "digits",
            "train",
        )
        assert 0 < work.seconds_left <= 60
        described = work.content.object
        assert described.sha256 == hashlib.sha256(model).digest()
        chunks = [
            c.data async for c in stub.Fetch(link.FetchRequest(message_id="m1", sha256=described.sha256))
        ]
        assert b"".join(chunks) == model
        request = link.FetchRequest(message_id="m1", sha256=described.sha256, offset=1_000_000)
        assert b"".join([c.data async for c in stub.Fetch(request)]) == model[1_000_000:]
        result = tools.answer_of(update)
        reply = await tools.submit(stub, "m1", result, update, step=100_000)
        assert reply.outcome == link.SubmitReply.ACCEPTED
        answers = [answer async for answer in replies]
        assert [(a.message_id, a.node_id) for a in answers] == [("m1", device.node_id)]
        assert answers[0].result == result.SerializeToString()
        assert (rig.home.spool("run-1") / answers[0].spool).read_bytes() == update
        again = await tools.submit(stub, "m1", result, update)
        assert again.outcome == link.SubmitReply.ACCEPTED
        closed = await rig.close_messages("m1")
        assert (closed.late, closed.bytes_up) == (0, len(update))
        assert closed.bytes_down == len(model) + len(model) - 1_000_000
        assert list(rig.home.spool("run-1").iterdir()) == []
        status = await rig.admin.Status(admin.StatusRequest())
        assert status.devices[0].seconds > 0
        assert list(status.devices[0].tags) == ["north"]

    hub(scenario)


@pytest.mark.slow
def test_a_hub_that_was_restarted_goes_on_with_what_is_open(hub: Any, tools: Any) -> None:
    async def scenario(rig: Any) -> None:
        device = rig.device()
        await device.welcome()
        await rig.run()
        await rig.push("m1", "m2", "m3", to=device)
        assert (
            await tools.submit(device.stub(), "m1", tools.answer_of())
        ).outcome == link.SubmitReply.ACCEPTED
        await rig.down()
        await rig.up()
        stream = await device.welcome(working_on=["m2"])  # so only the third is sent again
        assert (await stream.work()).message_id == "m3"
        stub = device.stub()
        for name in ("m2", "m3"):
            assert (await tools.submit(stub, name, tools.answer_of())).outcome == link.SubmitReply.ACCEPTED
        await rig.push("m1", "m2", to=device)  # a worker that does not know whether its call arrived
        assert sorted(await rig.all_replies("m1", "m2", "m3")) == ["m1", "m2", "m3"]

    hub(scenario)


@pytest.mark.slow
def test_a_broken_submit_goes_on_where_it_broke(hub: Any, tools: Any) -> None:
    update = bytes(range(250)) * 1000

    async def scenario(rig: Any) -> None:
        device = rig.device()
        await device.welcome()
        await rig.run()
        await rig.push("m1", to=device, max_result_bytes=len(update))
        result, sha = tools.answer_of(update), hashlib.sha256(update).digest()
        broken = await tools.submit(device.stub(), "m1", result, update[:100_000])
        assert broken.outcome == link.SubmitReply.INCOMPLETE
        stub = device.stub()
        turn = link.TurnRequest(message_id="m1", kind=link.TurnRequest.SUBMIT, sha256=sha)
        reply = await stub.Turn(turn)
        assert (reply.wanted, reply.granted, reply.offset) == (True, True, 100_000)
        await rig.down()
        await rig.up()
        stub = device.stub()
        other = link.TurnRequest(message_id="m1", kind=link.TurnRequest.SUBMIT, sha256=b"o" * 32)
        assert (await stub.Turn(other)).offset == 0
        lost = await tools.submit(stub, "m1", result, update, offset=200_000)
        assert lost.outcome == link.SubmitReply.INCOMPLETE
        done = await tools.submit(stub, "m1", result, update, offset=100_000)
        assert done.outcome == link.SubmitReply.ACCEPTED
        assert [path.read_bytes() for path in rig.home.spool("run-1").glob("m1.*")] == [update]
        assert not (await stub.Turn(turn)).wanted

    hub(scenario)


@pytest.mark.slow
def test_a_device_that_goes_away_fails_its_messages_after_the_grace(hub: Any) -> None:
    async def scenario(rig: Any) -> None:
        device, never_here = rig.device(), rig.device()
        stream = await device.welcome()
        await rig.run()
        await rig.push("m1", to=device)
        await rig.push("m2", to=never_here)
        await stream.work()
        stream.leave()
        results = await rig.all_replies("m1", "m2")
        assert {name: result.failure.code for name, result in results.items()} == {"m1": 5, "m2": 5}
        assert "went away" in results["m1"].failure.reason

    hub(scenario, offline_grace_s=0.3)


@pytest.mark.slow
def test_a_device_that_is_back_within_the_grace_fails_nothing(hub: Any, tools: Any) -> None:
    async def scenario(rig: Any) -> None:
        device = rig.device()
        first = await device.welcome()
        await rig.run()
        await rig.push("m1", to=device)
        await first.work()
        first.leave()
        stream = await device.welcome()
        assert (await stream.work()).message_id == "m1"
        await asyncio.sleep(0.6)  # longer than the grace
        assert (
            await tools.submit(device.stub(), "m1", tools.answer_of())
        ).outcome == link.SubmitReply.ACCEPTED
        assert (await rig.all_replies("m1"))["m1"].WhichOneof("kind") == "content"

    hub(scenario, offline_grace_s=0.5)


@pytest.mark.slow
def test_a_deadline_ends_the_replies_and_makes_an_answer_late(hub: Any, tools: Any) -> None:
    async def scenario(rig: Any) -> None:
        device = rig.device()
        stream = await device.welcome()
        await rig.run()
        await rig.push("m1", to=device, deadline_s=0.3)
        await stream.work()
        assert await rig.all_replies("m1") == {}
        assert (await stream.read()).cancel.message_id == "m1"
        assert (
            await tools.submit(device.stub(), "m1", tools.answer_of())
        ).outcome == link.SubmitReply.TOO_LATE
        assert (await rig.close_messages("m1")).late == 1

    hub(scenario)


def test_close_cancels_at_the_device_and_counts_late_answers(hub: Any, tools: Any) -> None:
    async def scenario(rig: Any) -> None:
        device = rig.device()
        stream = await device.welcome()
        await rig.run()
        await rig.push("m1", to=device)
        await stream.work()
        replies = rig.replies("m1")
        assert (await rig.close_messages("m1")).late == 0
        assert [reply async for reply in replies] == []
        assert (await stream.read()).cancel.message_id == "m1"
        for _ in range(2):  # counted once
            reply = await tools.submit(device.stub(), "m1", tools.answer_of(b"x" * 10), b"x" * 10)
            assert reply.outcome == link.SubmitReply.TOO_LATE
        assert (await rig.close_messages()).late == 1

    hub(scenario)


def test_a_new_session_closes_what_an_older_one_had_open(hub: Any, tools: Any) -> None:
    async def scenario(rig: Any) -> None:
        device = rig.device()
        stream = await device.welcome()
        await rig.run()
        await rig.push("m1", to=device, data=b"model")
        await stream.work()
        older = rig.session
        await rig.run()
        assert (await stream.read()).cancel.message_id == "m1"
        assert list(rig.home.objects("run-1").iterdir()) == []
        await rig.push("m2", to=device)
        assert (await stream.work()).message_id == "m2"
        rig.session = older
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await rig.push("m3", to=device)
        assert refused.value.code() == grpc.StatusCode.FAILED_PRECONDITION

    hub(scenario)


@pytest.mark.slow
def test_a_device_of_wire_version_1_is_served(hub: Any, tools: Any) -> None:
    async def scenario(rig: Any) -> None:
        device = rig.device()
        stream = await device.connect(version=1)
        welcome = (await stream.read()).welcome
        assert (welcome.wire_version, welcome.ca_bundle) == (1, rig.authority.bundle)
        await rig.run()
        await rig.push("m1", "m2", to=device, data=b"model")
        work = await stream.work()
        stub = device.stub()
        request = link.FetchRequest(message_id="m1", sha256=work.content.object.sha256)
        assert b"".join([chunk.data async for chunk in stub.Fetch(request)]) == b"model"
        reply = await tools.submit(stub, "m1", tools.answer_of(b"update"), b"update")
        assert reply.outcome == link.SubmitReply.ACCEPTED
        assert (await stream.work()).message_id == "m2"
        await rig.close_messages("m2")  # it would not understand Cancel
        await rig.push("m3", to=device)
        assert (await stream.work()).message_id == "m3"

    hub(scenario)


@pytest.mark.slow
def test_nodes_are_chosen_by_task_tier_tag_and_speed(hub: Any) -> None:
    async def scenario(rig: Any) -> None:
        north = rig.device(tier="micro")
        await north.welcome(tags=["north", "old"])
        await rig.run()

        async def nodes(at_least: int = 0, timeout_s: float = 0.0, **selection: Any) -> list[int]:
            wanted = admin.Selection(**{"task": "digits", "task_digest": "d" * 64, **selection})
            request = admin.NodesRequest(
                run_id="run-1", selection=wanted, at_least=at_least, timeout_s=timeout_s
            )
            return list((await rig.runs.Nodes(request)).node_ids)

        south = rig.device(tier="board")
        waiting = asyncio.ensure_future(nodes(2, 10))
        await south.welcome(tags=["south"])
        assert await waiting == sorted([north.node_id, south.node_id])
        assert await nodes(tiers=["board", "gateway"]) == [south.node_id]
        assert await nodes(tags=["north"]) == [north.node_id]
        assert await nodes(tags=["north", "south"]) == []
        assert await nodes(task_digest="e" * 64) == []
        rig.hub._fleet.answered(north.node_id, 5.0)
        assert await nodes(max_seconds=4.0) == [south.node_id]
        assert await nodes(3, 0.05) == sorted([north.node_id, south.node_id])

    hub(scenario)


@pytest.mark.slow
def test_a_second_connection_takes_the_place_of_the_first(hub: Any) -> None:
    async def scenario(rig: Any) -> None:
        device = rig.device()
        first = await device.welcome()
        second = await device.welcome()
        assert (await first.end())[0] == grpc.StatusCode.ABORTED
        await rig.run()
        await rig.push("m1", to=device)
        assert (await second.work()).message_id == "m1"

    hub(scenario)


@pytest.mark.slow
def test_a_connection_ends_in_peace_at_its_age(hub: Any) -> None:
    async def scenario(rig: Any) -> None:
        stream = await rig.device().welcome()
        assert (await stream.end())[0] == grpc.StatusCode.OK

    hub(scenario, max_connection_age_s=0.5)


def test_everybody_hears_of_a_new_bundle(hub: Any) -> None:
    async def scenario(rig: Any) -> None:
        device, old = rig.device(), rig.device()
        digest = bytes.fromhex(rig.authority.bundle_digest)
        stream = await device.connect(bundle_sha256=digest)
        assert (await stream.read()).welcome.ca_bundle == b""
        await old.welcome(version=1)
        rig.authority.rotate()
        await rig.admin.Refresh(admin.RefreshRequest())
        assert (await stream.read()).new_bundle.ca_bundle == rig.authority.bundle
        await rig.device().welcome()  # signed by the second authority

    hub(scenario)
