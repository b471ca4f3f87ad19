"""The hub as a whole: one for each home, its ports, its health, and what it is like from the command line."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fedge.errors import FedgeError, UserError
from fedge.wire.v1 import admin_pb2 as admin
from fedge_server.cli import main
from fedge_server.hub import control
from fedge_server.hub import server as server_module
from fedge_server.hub.home import Home
from fedge_server.hub.server import only_hub, read_ports

WAIT_S = 30.0


@pytest.mark.slow
def test_two_hubs_on_one_home_are_refused(tmp_path: Path) -> None:
    home = Home(tmp_path)
    assert not control.is_up(home)
    with only_hub(home):
        assert control.is_up(home)
        with pytest.raises(UserError, match="another hub is up"), only_hub(home):
            pass
    assert not control.is_up(home)


def test_the_sockets_and_ports_are_there_while_the_hub_is_up(hub: Any) -> None:
    async def scenario(rig: Any) -> None:
        assert rig.home.socket.stat().st_mode & 0o777 == 0o600
        assert read_ports(rig.home) == {"link": rig.hub.link_port, "enrolment": rig.hub.enrolment_port}
        await rig.down()
        assert not rig.home.socket.exists()
        assert read_ports(rig.home) == {}
        await rig.up()

    hub(scenario)


def test_a_port_that_is_taken_is_named(hub: Any, tools: Any, tmp_path: Path) -> None:
    async def scenario(rig: Any) -> None:
        other = tools.rig(tmp_path / "other")
        port = rig.hub.link_port
        other.settings = type(other.settings).from_mapping(
            {"listen": {"host": "127.0.0.1", "link_port": port, "enrolment_port": 0}}
        )
        with pytest.raises(FedgeError, match=f"cannot listen on 127.0.0.1:{port}"):
            await other.up()
        await other.hub.stop()
        other.registry.close()

    hub(scenario)


def test_health_is_told_on_both_ports(hub: Any) -> None:
    async def scenario(rig: Any) -> None:
        device = rig.device()
        device.stub()
        anonymous = grpc.aio.secure_channel(
            f"localhost:{rig.hub.enrolment_port}", grpc.ssl_channel_credentials(rig.authority.bundle)
        )
        for channel, name in ((device.channels[0], "fedge.v1.Link"), (anonymous, "fedge.v1.Enrolment")):
            stub = health_pb2_grpc.HealthStub(channel)
            reply = await stub.Check(health_pb2.HealthCheckRequest(service=name))
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
        await anonymous.close()

    hub(scenario)


@pytest.mark.slow
def test_who_connects_for_enrolment_and_says_nothing_is_sent_away(
    hub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "_ENROLMENT_AGE_S", 1)
    monkeypatch.setattr(server_module, "_ENROLMENT_GRACE_S", 1)

    def stay(port: int) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_alpn_protocols(["h2"])
        with (
            socket.create_connection(("127.0.0.1", port), 10) as plain,
            context.wrap_socket(plain) as secured,
        ):
            secured.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0")
            while secured.recv(4096):  # until the server closes
                pass

    async def scenario(rig: Any) -> None:
        await asyncio.wait_for(asyncio.to_thread(stay, rig.hub.enrolment_port), 10)

    hub(scenario)


def test_the_house_is_kept_after_something_unforeseen(
    hub: Any, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "HOUSEKEEPING_S", 0.02)
    looks: list[int] = []

    async def scenario(rig: Any) -> None:
        async def fails() -> None:
            looks.append(1)
            raise RuntimeError("unforeseen")

        monkeypatch.setattr(rig.hub, "refresh", fails)
        await tools.until(lambda: len(looks) > 2)

    hub(scenario)


def test_a_run_that_is_over_leaves_no_open_messages(hub: Any, tools: Any) -> None:
    async def scenario(rig: Any) -> None:
        device = rig.device()
        stream = await device.welcome()
        await rig.run()
        await rig.push("m1", to=device, data=b"model")
        await stream.work()
        rig.registry.request_stop("run-1")
        await rig.admin.Refresh(admin.RefreshRequest())
        assert (await stream.read()).cancel.message_id == "m1"
        await tools.until(lambda: not rig.home.objects("run-1").exists())
        assert rig.registry.run("run-1")["status"] == "stopped"
        assert rig.registry.queue.open_messages() == []

    hub(scenario)


@pytest.fixture
def home(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """What `fedge-server init` makes."""
    root = tmp_path / "home"
    argv = ["init", "--home", str(root), "--name", "localhost", "--link-port", "0", "--enrolment-port", "0"]
    assert main(argv) == 0
    capsys.readouterr()
    return root


@pytest.fixture
def process(home: Path) -> Iterator[subprocess.Popen[str]]:
    """`fedge-server up` on that home."""
    code = f"import sys; sys.path[:0] = {sys.path!r}; from fedge_server.cli import main; sys.exit(main())"
    argv = [sys.executable, "-c", code, "up", "--home", str(home)]
    made = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)
    ends = time.monotonic() + WAIT_S
    while not control.status(Home(home)):
        assert time.monotonic() < ends
        assert made.poll() is None, made.communicate()
        time.sleep(0.05)
    yield made
    made.kill()
    made.communicate()


@pytest.mark.slow
def test_up_serves_until_sigterm_and_ends_with_0(
    home: Path, process: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["up", "--home", str(home)]) == 2
    assert "another hub is up" in capsys.readouterr().err
    assert main(["preflight", "--home", str(home), "--format", "json"]) == 0
    findings = {found["what"]: found["detail"] for found in json.loads(capsys.readouterr().out)}
    assert findings["socket"] == "a hub is up"
    assert "held by the hub" in findings["port of link"]
    process.send_signal(signal.SIGTERM)
    _, lines = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0
    assert "hub is up: devices on" in lines
    assert "hub is down" in lines


def preflight(home: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, tuple[bool, str]]:
    main(["preflight", "--home", str(home), "--format", "json"])
    found = json.loads(capsys.readouterr().out)
    return {finding["what"]: (finding["good"], finding["detail"]) for finding in found}


def test_preflight_finds_what_is_wrong(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert all(good for good, _ in preflight(home, capsys).values())
    (home / "tls" / "server.pem").chmod(0o644)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        (home / "server.toml").write_text(
            f"[listen]\nhost = '127.0.0.1'\nlink_port = {port}\n[public]\nnames = ['no-such-host.invalid']\n"
        )
        found = preflight(home, capsys)
    bad = {what for what, (good, _) in found.items() if not good}
    assert bad == {"keys", "port of link", "name no-such-host.invalid"}
    assert "chmod" in found["keys"][1]
    (home / "server.toml").write_text("[listn]")
    assert preflight(home, capsys)["settings"][0] is False


@pytest.mark.slow
def test_a_run_is_checked_then_queued_stopped_and_resumed(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "digits.toml"
    config.write_text("task = 'digits'\n[rounds]\ncount = 2\n")
    where = ["--home", str(home)]

    def said(*argv: str, code: int = 0) -> str:
        assert main([*argv, *where]) == code
        output = capsys.readouterr()
        return output.err if code else output.out

    assert "unknown key" in said("run", "start", str(config), "--set", "rounds.cuont=1", code=2)
    assert "no built-in task" in said("run", "start", str(config), "--set", "task=digit", code=2)
    assert "no-such.npz" in said("run", "start", str(config), "--set", "data=no-such.npz", "--set",
                                 "task=images", code=2)  # fmt: skip
    assert "--name" in said("run", "start", str(config), "--name", "../x", code=2)
    assert said("run", "ls") == "no runs\n"
    assert "no hub is up" in said("run", "start", str(config), "--name", "first", "--set", "seed=3")
    assert json.loads((home / "runs" / "first" / "config.json").read_text())["seed"] == 3
    assert "there is one already" in said("run", "start", str(config), "--name", "first", code=2)
    assert said("run", "ls").startswith("first  queued   digits  0 rounds")
    assert said("run", "stop", "first") == "run first: stopped\n"
    assert "is stopped already" in said("run", "stop", "first", code=2)
    assert said("run", "resume", "first").startswith("run first: queued\n")
    assert "only a failed or stopped run" in said("run", "resume", "first", code=2)
    (home / "runs" / "first" / "log").write_text("round 1\n")
    assert main(["run", "log", "first", *where]) == 0
    assert capsys.readouterr().out == "round 1\n"
    assert "there is none" in said("run", "show", "second", code=2)


def test_a_folder_that_is_no_home_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["up"], ["run", "start", "x.toml"], ["run", "ls"]):
        assert main([*argv, "--home", str(tmp_path)]) == 2
        assert capsys.readouterr().err
