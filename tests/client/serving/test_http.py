"""The HTTP endpoint on a real socket: answers, refusals, slow and hostile callers, models exchanged."""

from __future__ import annotations

import asyncio
import io
import json
import stat
import struct
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedge.errors import UserError
from fedge.spec import Spec
from fedge_client.serving.holder import Holder
from fedge_client.serving.limits import Limits
from fedge_client.serving.running import Address, Watcher, listening

TABLE = Spec("features", (3,), "float32", ("no", "yes"), ("age", "mass", "dose"))
LENGTH_0 = b"Content-Length: 0\r\n\r\n"
TEXT = Spec("text", (4,), "uint8", tuple("abcd "))


def npy(x: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, x)
    return file.getvalue()


def png(size: tuple[int, int] = (8, 8)) -> bytes:
    file = io.BytesIO()
    Image.new("L", size).save(file, "PNG")
    return file.getvalue()


class Slow:
    """A model that waits until it may answer."""

    def __init__(self, model: Any) -> None:
        self.model, self.go, self.started = model, threading.Event(), threading.Semaphore(0)

    def run(self, x: Any) -> Any:
        self.started.release()
        assert self.go.wait(20)
        return self.model.run(x)


def test_an_image_an_array_and_a_batch_are_answered_with_label_confidence_and_version(
    up: Any, runtime_of: Any, wire: Any
) -> None:
    async def scenario() -> None:
        async with up(Holder(runtime_of(7, answer=2))) as served:
            for body, kind, count in (
                (png((30, 20)), "image/png", 1),
                (npy(np.zeros((8, 8), np.uint8)), "application/x-npy", 1),
                (npy(np.zeros((5, 8, 8), np.int64)), "application/x-npy", 5),
            ):
                reply = await served.ask(wire.post(body, kind))
                assert reply.status == 200, reply.body
                found = reply.json
                assert (found["release"], len(found["model"])) == (7, 64)
                assert [p["label"] for p in found["predictions"]] == ["two"] * count
                assert found["predictions"][0]["confidence"] == pytest.approx(0.9647, abs=1e-4)
                assert list(found["predictions"][0]["probabilities"]) == ["zero", "one", "two"]

    asyncio.run(scenario())


def test_table_rows_and_text_are_answered(up: Any, runtime_of: Any, wire: Any) -> None:
    async def scenario() -> None:
        holder = Holder(runtime_of(spec=TABLE))
        async with up(holder) as served:
            rows = json.dumps([{"age": 1, "mass": 0, "dose": 3}, {"age": 1, "mass": 2, "dose": 3}])
            assert (
                len((await served.ask(wire.post(rows.encode(), "application/json"))).json["predictions"]) == 2
            )
            reply = await served.ask(wire.post(b"dose,age,mass\n1,2,3\n", "text/csv"))
            assert reply.json["predictions"][0]["label"] == "no"
            holder.swap(runtime_of(2, spec=TEXT, answer=3))
            reply = await served.ask(wire.post(b"abcdabcd", "text/plain"))
            assert (reply.json["release"], reply.json["predictions"][0]["label"]) == (2, "d")

    asyncio.run(scenario())


def test_one_connection_carries_many_requests_and_says_what_it_is(
    up: Any, runtime_of: Any, wire: Any
) -> None:
    async def scenario() -> None:
        async with up(Holder(runtime_of(3))) as served:
            reader, writer = await served.connect()
            writer.write(b"GET /v1/model HTTP/1.1\r\n\r\n")
            model = (await wire.read_reply(reader)).json
            assert (model["release"], model["task"], model["spec"]["shape"]) == (3, "digits", [8, 8])
            for _ in range(3):
                writer.write(wire.post(npy(np.zeros((8, 8), np.uint8))))
                assert (await wire.read_reply(reader)).status == 200
            writer.write(b"GET /v1/health HTTP/1.1\r\nConnection: close\r\n\r\n")
            health = (await wire.read_reply(reader)).json
            assert (health["release"], health["answered"], health["open"], health["connections"]) == (
                3,
                3,
                0,
                1,
            )
            assert await reader.read() == b""
            writer.close()

    asyncio.run(scenario())


def test_before_the_first_installation_the_service_says_so(up: Any, wire: Any) -> None:
    async def scenario() -> None:
        async with up(Holder()) as served:
            reply = await served.ask(wire.post(npy(np.zeros((8, 8), np.uint8))))
            assert (reply.status, reply.json["error"]["message"]) == (
                503,
                "no model is installed on this device yet",
            )
            assert (await served.ask(b"GET /v1/model HTTP/1.1\r\n\r\n")).status == 503
            assert (await served.ask(b"GET /v1/health HTTP/1.1\r\n\r\n")).json["release"] is None

    asyncio.run(scenario())


def huge_npy() -> bytes:
    """A header that declares 10^12 numbers, and 16 bytes."""
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000, 1000000), }"
    header += b" " * (118 - len(header) - 1) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(16)


@pytest.mark.parametrize(
    ("body", "kind", "status", "said"),
    [
        (b"", "application/x-npy", 400, "not an .npy file"),
        (b"rubbish", "image/png", 400, "cannot be read as an image"),
        (huge_npy(), "application/x-npy", 400, "not an .npy file"),
        (npy(np.zeros((8, 8), np.float64)), "application/x-npy", 400, "whole numbers"),
        (npy(np.full((8, 8), 300)), "application/x-npy", 400, "holds values 300 .. 300"),
        (npy(np.zeros((9, 8), np.uint8)), "application/x-npy", 400, "has shape (9, 8)"),
        (
            npy(np.zeros((257, 8, 8), np.uint8)),
            "application/x-npy",
            400,
            "257 examples; a request has 1 to 256",
        ),
        (npy(np.zeros((0, 8, 8), np.uint8)), "application/x-npy", 400, "0 examples"),
        (npy(np.array(["a"])), "application/x-npy", 400, "not plain numbers"),
        (png((4000, 3000)), "image/png", 400, "4000 x 3000 pixels"),
        (b"abcd", "text/plain", 400, "is text"),
        (b"\xff", "text/plain", 400, "not UTF-8"),
        (b"x", "application/zip", 415, "Content-Type must be one of"),
    ],
)
def test_input_that_does_not_fit_gets_a_clear_status(
    body: bytes, kind: str, status: int, said: str, up: Any, runtime_of: Any, wire: Any
) -> None:
    async def scenario() -> None:
        async with up(Holder(runtime_of())) as served:
            reply = await served.ask(wire.post(body, kind))
            assert (reply.status, said in reply.json["error"]["message"]) == (status, True), reply.body
            assert (await served.ask(wire.post(npy(np.zeros((8, 8), np.uint8))))).status == 200

    asyncio.run(scenario())


def test_nan_is_a_missing_value_of_a_table_and_refused_in_an_image(
    up: Any, runtime_of: Any, wire: Any
) -> None:
    floats = Spec("image", (2, 2), "float32", ("no", "yes"))

    async def scenario() -> None:
        holder = Holder(runtime_of(spec=TABLE))
        async with up(holder) as served:
            row = npy(np.array([[np.nan, 1, 2]], np.float32))
            reply = await served.ask(
                wire.post(row)
            )  # it is let in; this toy adds it up, and has no answer then
            assert (reply.status, "no usable answer" in reply.json["error"]["message"]) == (500, True)
            holder.swap(runtime_of(2, spec=floats))
            reply = await served.ask(wire.post(npy(np.full((2, 2), np.nan, np.float32))))
            assert (reply.status, "NaN in an image" in reply.json["error"]["message"]) == (400, True)

    asyncio.run(scenario())


def test_a_body_of_five_megabytes_is_refused_before_it_is_read(up: Any, runtime_of: Any, wire: Any) -> None:
    async def scenario() -> None:
        async with up(Holder(runtime_of())) as served:
            reply = await served.ask(wire.post(b"", Content_Length="5000000"))  # nothing of it is sent
            assert (reply.status, "over 4194304" in reply.json["error"]["message"]) == (413, True)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /v1/infer HTTP/1.1\r\n\r\n", 405),
        (b"GET /other HTTP/1.1\r\n\r\n", 404),
        (b"BAD\r\n\r\n", 400),
        (b"GET /v1/model HTTP/1.1\r\nOrigin: http://localhost\r\n\r\n", 403),
        (b"GET / HTTP/1.1\r\nx: " + b"a" * 9000 + b"\r\n\r\n", 431),
        (
            b"POST /v1/infer HTTP/1.1\r\nFedge-Deadline-Ms: 0\r\nContent-Type: text/csv\r\n" + LENGTH_0,
            400,
        ),
    ],
)
def test_a_request_that_is_none_gets_a_clear_status(
    request_: bytes, status: int, up: Any, runtime_of: Any
) -> None:
    async def scenario() -> None:
        async with up(Holder(runtime_of())) as served:
            assert (await served.ask(request_)).status == status

    asyncio.run(scenario())


def test_a_body_waits_for_the_word_that_it_may_come(up: Any, runtime_of: Any, wire: Any) -> None:
    body = npy(np.zeros((8, 8), np.uint8))

    async def scenario() -> None:
        async with up(Holder(runtime_of())) as served:
            reader, writer = await served.connect()
            writer.write(wire.post(b"", Content_Length=str(len(body)), Expect="100-continue"))
            assert (
                await asyncio.wait_for(reader.readexactly(25), wire.wait_s)
                == b"HTTP/1.1 100 Continue\r\n\r\n"
            )
            writer.write(body)
            assert (await wire.read_reply(reader)).status == 200
            writer.close()

    asyncio.run(scenario())


def test_what_is_too_much_is_refused_at_once_and_what_waits_too_long_in_time(
    up: Any, runtime_of: Any, wire: Any, tools: Any
) -> None:
    async def scenario() -> None:
        model = runtime_of()
        slow = Slow(model._model)
        async with up(Holder(runtime_of(model=slow)), queue=2, deadline_s=30.0) as served:
            request = wire.post(npy(np.zeros((8, 8), np.uint8)))
            first = asyncio.create_task(served.ask(request))
            assert await asyncio.to_thread(slow.started.acquire, timeout=20)
            waiting = [asyncio.create_task(served.ask(request)) for _ in range(2)]
            while served.listening.service.open < 3:
                await asyncio.sleep(0.01)
            busy = await served.ask(request)
            assert (busy.status, "ask again later" in busy.json["error"]["message"]) == (503, True)
            slow.go.set()
            assert {(await each).status for each in (first, *waiting)} == {200}

    asyncio.run(scenario())


def test_a_request_that_is_not_answered_by_its_deadline_is_told_so_then(
    up: Any, runtime_of: Any, wire: Any
) -> None:
    async def scenario() -> None:
        slow = Slow(runtime_of()._model)
        async with up(Holder(runtime_of(model=slow))) as served:
            request = wire.post(npy(np.zeros((8, 8), np.uint8)), Fedge_Deadline_Ms="50")
            reply = await served.ask(request)
            assert (reply.status, reply.json["error"]["message"]) == (504, "not answered within 0.05 s")
            slow.go.set()
            assert (await served.ask(wire.post(npy(np.zeros((8, 8), np.uint8))))).status == 200
            assert served.listening.service.late == 1

    asyncio.run(scenario())


def test_who_sends_nothing_gives_way_when_all_connections_are_taken(
    up: Any, runtime_of: Any, wire: Any
) -> None:
    async def scenario() -> None:
        async with up(Holder(runtime_of()), connections=8) as served:
            silent = [await served.connect() for _ in range(30)]
            for _ in range(5):
                assert (await served.ask(wire.post(npy(np.zeros((8, 8), np.uint8))))).status == 200
            assert await asyncio.wait_for(silent[0][0].read(), wire.wait_s) == b""  # the first was cut
            health = (await served.ask(b"GET /v1/health HTTP/1.1\r\n\r\n")).json
            assert health["connections"] <= 8
            for _, writer in silent:
                writer.close()

    asyncio.run(scenario())


@pytest.mark.slow
def test_bodies_that_do_not_come_are_given_up_and_their_room_is_free_again(
    up: Any, runtime_of: Any, wire: Any
) -> None:
    async def scenario() -> None:
        async with up(Holder(runtime_of()), bodies_bytes=8 * 1024**2, read_s=1.0) as served:
            stalled = []
            for _ in range(2):
                reader, writer = await served.connect()
                writer.write(wire.post(b"x" * 100, Content_Length=str(4 * 1024**2)))
                stalled.append((reader, writer))
            request = wire.post(npy(np.zeros((8, 8), np.uint8)))
            until = time.monotonic() + wire.wait_s
            while (busy := await served.ask(request)).status == 200 and time.monotonic() < until:
                await asyncio.sleep(0.01)  # the stalled ones have not been read yet
            assert (busy.status, "bodies" in busy.json["error"]["message"]) == (503, True)
            for reader, _ in stalled:
                assert (await wire.read_reply(reader)).status == 408
            assert (await served.ask(request)).status == 200
            for _, writer in stalled:
                writer.close()

    asyncio.run(scenario())


@pytest.mark.slow
def test_a_reader_that_stalls_is_cut_off_and_others_are_served(up: Any, runtime_of: Any, wire: Any) -> None:
    many = Spec("features", (3,), "float32", tuple(f"label {i} with a long name" for i in range(900)))

    async def scenario() -> None:
        async with up(Holder(runtime_of(spec=many)), read_s=0.5) as served:
            request = wire.post(npy(np.zeros((100, 3), np.float32)))  # its answer has some megabytes
            stalled = []
            for _ in range(3):
                reader, writer = await asyncio.open_unix_connection(
                    served.listening.http.removeprefix("unix:"), limit=1024
                )
                writer.write(request)
                stalled.append((reader, writer))
            small = wire.post(npy(np.zeros((1, 3), np.float32)))
            until = time.monotonic() + wire.wait_s
            while (await served.ask(b"GET /v1/health HTTP/1.1\r\n\r\n")).json["connections"] > 1:
                assert (await served.ask(small)).status == 200
                assert time.monotonic() < until
            for _, writer in stalled:
                writer.close()

    asyncio.run(scenario())


def test_models_are_exchanged_under_load_and_no_request_is_lost(up: Any, runtime_of: Any, wire: Any) -> None:
    async def scenario() -> None:
        closed: list[int] = []
        holder = Holder(runtime_of(1, answer=1), lambda old: closed.append(old.release.version))
        answers: list[tuple[int, str]] = []
        async with up(holder, workers=2) as served:
            stop = asyncio.Event()

            async def asker() -> None:
                reader, writer = await served.connect()
                while not stop.is_set():
                    writer.write(wire.post(npy(np.zeros((2, 8, 8), np.uint8))))
                    reply = await wire.read_reply(reader)
                    assert reply.status == 200, reply.body
                    labels = {p["label"] for p in reply.json["predictions"]}
                    answers.append((reply.json["release"], *labels))
                writer.close()

            askers = [asyncio.create_task(asker()) for _ in range(4)]
            for version in range(2, 22):
                before = len(answers)
                while len(answers) < before + 8:
                    await asyncio.sleep(0.001)
                holder.swap(runtime_of(version, answer=version % 3))
            stop.set()
            await asyncio.gather(*askers)
        names = ("zero", "one", "two")
        assert all(label == names[version % 3] for version, label in answers)  # never half of two models
        assert {version for version, _ in answers} | {21} == set(range(1, 22))  # 21 perhaps not
        assert closed == list(range(1, 21))

    asyncio.run(scenario())


@pytest.mark.slow
def test_the_socket_is_for_the_user_and_the_group_and_only_one_service_is_up(
    tmp_path: Path, runtime_of: Any
) -> None:
    address = Address.parse(f"unix:{tmp_path}/x.sock")

    async def scenario() -> None:
        async with listening(tmp_path, Holder(runtime_of()), Limits(), address, None):
            assert stat.S_IMODE((tmp_path / "x.sock").stat().st_mode) == 0o660
            with pytest.raises(UserError, match="another service is up"):
                async with listening(tmp_path, Holder(runtime_of()), Limits(), address, None):
                    pass
        async with listening(tmp_path, Holder(runtime_of()), Limits(), address, None):
            pass  # the file of the one before does not matter

    asyncio.run(scenario())


def test_a_port_of_this_device_works_too(tmp_path: Path, runtime_of: Any, wire: Any) -> None:
    async def scenario() -> None:
        address = Address.parse("127.0.0.1:0")
        async with listening(tmp_path, Holder(runtime_of()), Limits(), address, None) as found:
            reader, writer = await asyncio.open_connection("127.0.0.1", int(found.http.rpartition(":")[2]))
            writer.write(b"GET /v1/health HTTP/1.1\r\n\r\n")
            assert (await wire.read_reply(reader)).status == 200
            writer.close()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "text", ["0.0.0.0:80", "example.org:80", "unix:", "127.0.0.1", "127.0.0.1:70000", "unix:/" + "a" * 101]
)
def test_nobody_else_may_ask(text: str) -> None:
    with pytest.raises(UserError):
        Address.parse(text)


def test_what_is_installed_meanwhile_answers_and_what_is_damaged_does_not(
    tmp_path: Path, runtime_of: Any
) -> None:
    (tmp_path / "installed").mkdir()
    installed = {"runtime": runtime_of(1)}

    def open_(home: Path, threads: int) -> Any:
        found = installed["runtime"]
        if isinstance(found, Exception):
            raise found
        return found

    async def scenario() -> None:
        holder: Holder[Any] = Holder()
        watcher = Watcher(tmp_path, holder, open_=open_)
        await watcher.look()
        assert holder.current.release.version == 1
        installed["runtime"] = runtime_of(2)
        await watcher.look()
        assert holder.current.release.version == 1  # nothing was committed
        (tmp_path / "installed" / "current").write_text("2")
        await watcher.look()
        assert holder.current.release.version == 2
        installed["runtime"] = UserError("damaged")
        (tmp_path / "installed" / "current").write_text("three")
        await watcher.look()
        assert (holder.current.release.version, holder.swaps) == (2, 2)

    asyncio.run(scenario())
