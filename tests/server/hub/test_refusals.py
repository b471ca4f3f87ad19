"""Who is turned away, when, and with which status; and what a hostile device can send."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from fedge.wire import MAX_TENSORS
from fedge.wire.v1 import admin_pb2 as admin
from fedge.wire.v1 import link_pb2 as link
from fedge.wire.v1 import records_pb2 as records
from fedge_server.hub import connection as connection_module
from fedge_server.hub import link as link_module
from fedge_server.identity.authority import Authority

Code = grpc.StatusCode
UNKNOWN = link.TurnRequest(message_id="nothing", kind=link.TurnRequest.SUBMIT, sha256=b"s" * 32)


async def status_of(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call
    return refused.value.code(), refused.value.details() or ""


def test_a_device_without_a_certificate_is_refused_at_the_handshake(hub: Any) -> None:
    async def scenario(rig: Any) -> None:
        device = rig.device()
        code, _ = await status_of(device.stub(anonymous=True).Turn(UNKNOWN))
        assert code == Code.UNAVAILABLE
        assert not (await device.stub().Turn(UNKNOWN)).wanted  # and with one it is served

    hub(scenario)


def test_another_authoritys_certificate_is_refused_at_the_handshake(hub: Any, tmp_path: Path) -> None:
    async def scenario(rig: Any) -> None:
        device = rig.device(authority=Authority.create(tmp_path / "other"))
        assert (await status_of(device.stub().Turn(UNKNOWN)))[0] == Code.UNAVAILABLE

    hub(scenario)


def test_an_expired_certificate_is_refused(hub: Any) -> None:
    async def scenario(rig: Any) -> None:
        device = rig.device(hours=-1)
        assert (await status_of(device.stub().Turn(UNKNOWN)))[0] == Code.UNAVAILABLE

    hub(scenario)


@pytest.mark.slow
def test_a_certificate_that_expires_ends_the_live_stream(hub: Any) -> None:
    async def scenario(rig: Any) -> None:
        device = rig.device(hours=2.5 / 3600)
        stub = device.stub()
        stream = await device.connect(stub)
        assert (await stream.read()).WhichOneof("kind") == "welcome"
        code, details = await stream.end()
        assert code == Code.UNAUTHENTICATED
        assert "expired" in details
        assert (await status_of(stub.Turn(UNKNOWN)))[0] == Code.UNAUTHENTICATED

    hub(scenario)


def test_the_servers_own_certificate_is_no_devices(hub: Any) -> None:
    async def scenario(rig: Any) -> None:
        device = rig.device()
        key, device.certificate = rig.authority.issue_server(["localhost"], 1)
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        device.key = load_pem_private_key(key, None)
        code, _ = await status_of(device.stub().Turn(UNKNOWN))
        assert code in (Code.UNAVAILABLE, Code.UNAUTHENTICATED)  # TLS itself may refuse its usage

    hub(scenario)


def test_a_device_that_nobody_enrolled_is_refused(hub: Any, tools: Any) -> None:
    async def scenario(rig: Any) -> None:
        device, stranger = rig.device(), rig.device()
        with rig.registry.engine.begin() as database:
            database.exec_driver_sql(f"DELETE FROM devices WHERE id = '{stranger.id}'")
        code, details = await status_of(stranger.stub().Turn(UNKNOWN))
        assert code == Code.UNAUTHENTICATED
        assert "not enrolled" in details
        await device.welcome()

    hub(scenario)


def test_revocation_ends_a_live_stream_and_every_later_call(hub: Any) -> None:
    async def scenario(rig: Any) -> None:
        device = rig.device()
        stub = device.stub()
        stream = await device.connect(stub)
        await stream.read()
        rig.registry.devices.revoke(device.id, "stolen")
        # On the live connection, before anybody has told the hub.
        code, details = await status_of(stub.Turn(UNKNOWN))
        assert (code, "stolen" in details) == (Code.PERMISSION_DENIED, True)
        await rig.admin.Refresh(admin.RefreshRequest())
        assert (await stream.end())[0] == Code.PERMISSION_DENIED
        assert (await (await device.connect()).end())[0] == Code.PERMISSION_DENIED
        await rig.run()
        await rig.push("m1", to=device)
        assert "revoked" in (await rig.all_replies("m1"))["m1"].failure.reason

    hub(scenario)


def test_another_devices_message_is_refused_and_logged(
    hub: Any, tools: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(rig: Any) -> None:
        device, thief = rig.device(), rig.device()
        await device.welcome()
        await rig.run()
        await rig.push("m1", to=device, data=b"model")
        sha = hashlib.sha256(b"model").digest()
        stub = thief.stub()

        async def fetch() -> None:
            async for _ in stub.Fetch(link.FetchRequest(message_id="m1", sha256=sha)):
                pass

        assert (await status_of(fetch()))[0] == Code.PERMISSION_DENIED
        turn = link.TurnRequest(message_id="m1", kind=link.TurnRequest.FETCH, sha256=sha)
        assert (await status_of(stub.Turn(turn)))[0] == Code.PERMISSION_DENIED
        assert (await status_of(tools.submit(stub, "m1", tools.answer_of())))[0] == Code.PERMISSION_DENIED
        assert caplog.text.count(f"device {thief.id}") == 3
        reply = await tools.submit(device.stub(), "m1", tools.answer_of())
        assert reply.outcome == link.SubmitReply.ACCEPTED
        assert (await status_of(tools.submit(stub, "m1", tools.answer_of())))[0] == Code.PERMISSION_DENIED

    caplog.set_level(logging.WARNING)
    hub(scenario)


@pytest.mark.slow
def test_only_the_object_of_an_open_message_is_sent(hub: Any) -> None:
    async def scenario(rig: Any) -> None:
        device = rig.device()
        await device.welcome()
        await rig.run()
        await rig.push("m1", to=device, data=b"model")
        await rig.push("m2", to=device, data=b"other model")
        sha = hashlib.sha256(b"model").digest()
        stub = device.stub()

        async def fetch(name: str, digest: bytes, offset: int = 0) -> None:
            request = link.FetchRequest(message_id=name, sha256=digest, offset=offset)
            async for _ in stub.Fetch(request):
                pass

        assert (await status_of(fetch("m2", sha)))[0] == Code.NOT_FOUND
        assert (await status_of(fetch("m1", b"../../ca/1.pem")))[0] == Code.NOT_FOUND
        assert (await status_of(fetch("m3", sha)))[0] == Code.NOT_FOUND
        assert (await status_of(fetch("m1", sha, offset=6)))[0] == Code.INVALID_ARGUMENT
        await rig.close_messages("m1")
        assert (await status_of(fetch("m1", sha)))[0] == Code.NOT_FOUND

    hub(scenario)


@pytest.mark.slow
def test_a_stream_begins_with_hello(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "HELLO_S", 0.3)

    async def scenario(rig: Any) -> None:
        device = rig.device()
        silent = device.stub().Connect()
        assert (await status_of(silent.read()))[0] == Code.DEADLINE_EXCEEDED
        other = device.stub().Connect()
        await other.write(link.DeviceMessage(idle=link.Idle()))
        assert (await status_of(other.read()))[0] == Code.INVALID_ARGUMENT
        code, details = await (await device.connect(version=0)).end()
        assert (code, "oldest is 1" in details) == (Code.FAILED_PRECONDITION, True)
        tags = [str(number) for number in range(connection_module.MAX_ITEMS + 1)]
        assert (await (await device.connect(tags=tags)).end())[0] == Code.INVALID_ARGUMENT
        long = "m" * (connection_module.MAX_TEXT + 1)
        assert (await (await device.connect(working_on=[long])).end())[0] == Code.INVALID_ARGUMENT
        newer = await device.connect(version=99)
        assert (await newer.read()).welcome.wire_version == 2

    hub(scenario)


def tensors(*described: tuple[str, list[int]], size: int, sha256: bytes = b"s" * 32) -> records.Result:
    content = records.Content(object=records.Object(sha256=sha256, size=size))
    content.records.add(
        name="arrays",
        kind=records.Record.ARRAYS,
        tensors=[records.Tensor(name="w", dtype=dtype, shape=shape) for dtype, shape in described],
    )
    return records.Result(content=content)


def values(*found: records.Value) -> records.Result:
    entries = [records.Entry(key=str(number), value=value) for number, value in enumerate(found)]
    record = records.Record(name="config", kind=records.Record.CONFIG, entries=entries)
    return records.Result(content=records.Content(records=[record]))


def a_list(*items: records.Value) -> records.Value:
    return records.Value(list=records.Values(items=items))


BAD = {
    "garbage": (b"\xff" * 100, "cannot be decoded"),
    "nothing": (b"", "neither content nor failure"),
    "a size that is not the tensors'": (tensors(("float32", [10]), size=41), "tensors of 40 bytes"),
    "more than was allowed": (tensors(("uint8", [100_001]), size=100_001), "more than the 100000"),
    "more than 64 bits can count": (tensors(("float64", [2**63, 2**63]), size=16), "tensors of"),
    "an unknown dtype": (tensors(("object", [1]), size=8), "dtype 'object'"),
    "too many tensors": (lambda: tensors(*[("uint8", [0])] * (MAX_TENSORS + 1), size=0), "20001 tensors"),
    "no digest": (tensors(("uint8", [8]), size=8, sha256=b"s"), "SHA-256"),
    "too many records": (records.Result(content={"records": [records.Record()] * 65}), "65 records"),
    "too many values": (lambda: values(*[records.Value(flag=True)] * 65_537), "more than 65536 values"),
    "too many items": (
        lambda: values(a_list(*[records.Value(flag=True)] * 65_536)),
        "more than 65536 values",
    ),
    "a list within a list": (values(a_list(a_list())), "a list within a list"),
    "negative seconds": (records.Result(failure=records.Failure(code=1), seconds=-1.0), "seconds"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BAD)
def test_a_bad_answer_is_recorded_as_the_devices_failure(hub: Any, tools: Any, name: str) -> None:
    given, reason = BAD[name]
    result = given() if callable(given) else given  # large ones are made when their turn comes

    async def scenario(rig: Any) -> None:
        device = rig.device()
        await device.welcome()
        await rig.run()
        await rig.push("m1", to=device)
        reply = await tools.submit(device.stub(), "m1", result, b"x" * 50)
        assert (reply.outcome, reason in reply.reason) == (link.SubmitReply.REFUSED, True), reply
        assert reason in (await rig.all_replies("m1"))["m1"].failure.reason
        assert list(rig.home.spool("run-1").iterdir()) == []

    hub(scenario)


@pytest.mark.parametrize(
    ("data", "reason"), [(b"x" * 1001, "more than the 1000 bytes"), (b"y" * 1000, "SHA-256")]
)
def test_an_object_that_is_not_the_declared_one_is_refused(
    hub: Any, tools: Any, data: bytes, reason: str
) -> None:
    async def scenario(rig: Any) -> None:
        device = rig.device()
        await device.welcome()
        await rig.run()
        await rig.push("m1", to=device)
        reply = await tools.submit(device.stub(), "m1", tools.answer_of(b"x" * 1000), data, step=100)
        assert (reply.outcome, reason in reply.reason) == (link.SubmitReply.REFUSED, True), reply
        assert reason in (await rig.all_replies("m1"))["m1"].failure.reason
        assert list(rig.home.spool("run-1").iterdir()) == []

    hub(scenario)


def test_an_answer_begins_with_its_header(hub: Any) -> None:
    async def scenario(rig: Any) -> None:
        async def parts() -> AsyncIterator[link.SubmitPart]:
            yield link.SubmitPart(data=b"x")

        reply = await rig.device().stub().Submit(parts())
        assert reply.outcome == link.SubmitReply.REFUSED

    hub(scenario)


@pytest.mark.slow
def test_a_newer_submit_takes_over_from_one_that_hangs(hub: Any, tools: Any) -> None:
    update = b"u" * 50_000

    async def scenario(rig: Any) -> None:
        device = rig.device()
        await device.welcome()
        await rig.run()
        await rig.push("m1", to=device)
        result = tools.answer_of(update)
        hanging, stub = device.stub().Submit(), device.stub()
        header = link.SubmitHeader(message_id="m1", result=result.SerializeToString())
        await hanging.write(link.SubmitPart(header=header))
        await hanging.write(link.SubmitPart(data=update[:20_000]))
        turn = link.TurnRequest(
            message_id="m1", kind=link.TurnRequest.SUBMIT, sha256=hashlib.sha256(update).digest()
        )
        while (await stub.Turn(turn)).offset != 20_000:
            await asyncio.sleep(0.01)
        reply = await tools.submit(stub, "m1", result, update, offset=20_000)
        assert reply.outcome == link.SubmitReply.ACCEPTED
        assert [path.read_bytes() for path in rig.home.spool("run-1").glob("m1.*")] == [update]
        await hanging.write(link.SubmitPart(data=b"evil"))
        await hanging.done_writing()
        assert (await hanging).outcome in (link.SubmitReply.INCOMPLETE, link.SubmitReply.ACCEPTED)
        assert [path.read_bytes() for path in rig.home.spool("run-1").glob("m1.*")] == [update]

    hub(scenario)


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A disk of 2 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True
    )
    if done.returncode:
        pytest.skip(f"no small disk here: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_is_told_to_the_device_and_leaves_nothing_behind(
    hub: Any, tools: Any, small_disk: Path
) -> None:
    update = b"u" * 3_000_000

    async def scenario(rig: Any) -> None:
        device = rig.device()
        await device.welcome()
        await rig.run()
        rig.home.spool("run-1").rmdir()
        rig.home.spool("run-1").symlink_to(small_disk)
        await rig.push("m1", to=device, max_result_bytes=len(update))
        stub = device.stub()
        result = tools.answer_of(update)
        code, details = await status_of(tools.submit(stub, "m1", result, update, step=100_000))
        assert (code, details) == (Code.RESOURCE_EXHAUSTED, "the server's disk is full")
        assert list(small_disk.iterdir()) == []
        reply = await tools.submit(stub, "m1", tools.answer_of(b"small"), b"small")  # it is still wanted
        assert reply.outcome == link.SubmitReply.ACCEPTED

    hub(scenario)
