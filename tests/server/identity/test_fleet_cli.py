"""`fedge-server init`, `token`, `devices`, `ca` and `fedge-client enroll`, as a user types them."""

from __future__ import annotations

import fcntl
import io
import json
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from fedge.identity import JoinString
from fedge.wire.v1 import admin_pb2, admin_pb2_grpc
from fedge_client.agent.identity import Identity
from fedge_client.cli import main as client
from fedge_server.cli import init as init_module
from fedge_server.cli import main as server_main
from fedge_server.hub import control
from fedge_server.hub.home import Home
from fedge_server.hub.settings import Settings
from fedge_server.identity.admission import secret_digest
from fedge_server.identity.authority import Authority, ServerCertificate
from fedge_server.registry.database import Registry

Fedge = Callable[..., tuple[int, str, str]]


@pytest.fixture
def fedge(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Fedge:
    """Runs `fedge-server ...` over one home; gives exit code, output and errors."""

    def run(*words: str) -> tuple[int, str, str]:
        code = server_main([*words, "--home", str(tmp_path / "home")])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run


@pytest.fixture
def home(fedge: Fedge, tmp_path: Path) -> Home:
    assert fedge("init", "--name", "localhost")[0] == 0
    return Home(tmp_path / "home")


def devices(home: Home, *names: str) -> None:
    """Write devices down as an enrolment does."""
    with Registry.open(home.root) as registry:
        for number, name in enumerate(names):
            token = f"{number:016x}"
            registry.devices.create_token(
                token_id=token, secret_sha256="0" * 64, tier="micro", expires=time.time() + 60
            )
            registry.devices.enrol(
                device_id=name, node_id=number + 1, public_key="", sealing_key="", tier="micro",
                token_id=token, fedge_version="0.1.0", wire_version=2, not_after=time.time() + 60,
            )  # fmt: skip


class Admin(admin_pb2_grpc.AdminServicer):  # what a hub answers, and how often it was asked
    def __init__(self) -> None:
        self.refreshed = 0

    def Refresh(self, _: Any, __: Any) -> admin_pb2.RefreshReply:  # noqa: N802
        self.refreshed += 1
        return admin_pb2.RefreshReply()

    def Status(self, _: Any, __: Any) -> admin_pb2.StatusReply:  # noqa: N802
        online = admin_pb2.OnlineDevice(device_id="a1" * 32, tags=["north"], tasks=["digits"])
        return admin_pb2.StatusReply(devices=[online])


@pytest.fixture
def hub(home: Home, monkeypatch: pytest.MonkeyPatch) -> Iterator[Admin]:
    admin, served = Admin(), grpc.server(ThreadPoolExecutor(1))
    admin_pb2_grpc.add_AdminServicer_to_server(admin, served)  # type: ignore[no-untyped-call]
    served.add_insecure_port(f"unix:{home.socket}")
    served.start()
    with home.lock.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield admin
    served.stop(0).wait()


class TestInit:
    def test_makes_a_home_that_every_part_reads(self, home: Home) -> None:
        settings = Settings.load(home.settings)
        assert settings == Settings.from_mapping({"public": {"names": ["localhost"]}})
        assert ServerCertificate.load(home.tls).names >= {"localhost"}
        assert not Authority.open(home.ca).rotating
        modes = {path.name: path.stat().st_mode & 0o777 for path in home.root.iterdir()}
        assert set(modes) == {"ca", "tls", "keys", "repository", "fedge.db", "server.toml"}
        assert modes["ca"] == modes["tls"] == modes["keys"] == 0o700
        assert modes["server.toml"] == 0o600
        assert home.root.stat().st_mode & 0o777 == 0o700

    def test_writes_what_it_is_given(self, fedge: Fedge, tmp_path: Path) -> None:
        options = ("--name", "fedge.example.org", "--name", "192.0.2.7", "--link-port", "0")
        code, out, _ = fedge("init", *options, "--enrolment-port", "1234", "--format", "json")
        assert code == 0
        settings = Settings.load(tmp_path / "home" / "server.toml")
        assert settings.public.names == ("fedge.example.org", "192.0.2.7")
        assert (settings.listen.link_port, settings.listen.enrolment_port) == (0, 1234)
        assert json.loads(out)["pin"] == Authority.open(tmp_path / "home" / "ca").pin

    def test_refuses_a_home_and_changes_nothing(self, home: Home, fedge: Fedge) -> None:
        before = (home.ca / "1.pem").read_bytes()
        code, _, err = fedge("init")
        assert (code, "a server's home already" in err) == (2, True)
        assert (home.ca / "1.pem").read_bytes() == before

    def test_refuses_a_folder_with_something_else_in_it(self, fedge: Fedge, tmp_path: Path) -> None:
        (tmp_path / "home").mkdir()
        (tmp_path / "home" / "mine").write_text("precious")
        code, _, err = fedge("init")
        assert (code, "not empty" in err) == (2, True)
        assert (tmp_path / "home" / "mine").read_text() == "precious"

    @pytest.mark.parametrize(
        "words", [("--name", "a:9443"), ("--link-port", "70000"), ("--name", "*"), ("--database", "nonsense")]
    )
    def test_a_wrong_option_leaves_no_home(
        self, fedge: Fedge, tmp_path: Path, words: tuple[str, ...]
    ) -> None:
        code, _, err = fedge("init", *words)
        assert code == 2
        assert len(err.strip().splitlines()) == 1
        assert not (tmp_path / "home" / "server.toml").exists()

    @pytest.mark.parametrize("step", range(5))
    def test_after_a_kill_at_any_step_the_same_command_makes_the_home(
        self, fedge: Fedge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
    ) -> None:
        class Killed(BaseException):
            pass

        moved = 0
        replace = Path.replace

        def move(self: Path, target: Any) -> Path:
            nonlocal moved
            if self.parent.name == ".init" and self.name in init_module._PARTS:
                if moved == step:
                    raise Killed
                moved += 1
            return replace(self, target)

        monkeypatch.setattr(Path, "replace", move)
        with pytest.raises(Killed):
            fedge("init", "--name", "localhost")
        monkeypatch.undo()
        assert fedge("token", "ls")[0] == 2  # no home yet
        assert fedge("init", "--name", "localhost")[0] == 0
        assert fedge("ca", "status")[0] == 0
        assert not (tmp_path / "home" / ".init").exists()


class TestTokens:
    def test_a_join_string_is_all_that_a_device_needs(self, home: Home, fedge: Fedge) -> None:
        code, out, _ = fedge("token", "create", "--tier", "micro")
        join = JoinString.parse(out)
        assert (code, join.host, join.port) == (0, "localhost", 9444)
        assert join.pin == Authority.open(home.ca).pin
        with Registry.open(home.root) as registry:
            (token,) = registry.devices.tokens()
        assert (token.id, token.secret_sha256) == (join.token_id, secret_digest(join.secret))
        assert token.expires == pytest.approx(time.time() + 24 * 3600, abs=60)
        assert join.secret.encode() not in home.database.read_bytes()

    def test_many_are_made_listed_and_taken_back(self, home: Home, fedge: Fedge) -> None:
        out = fedge(
            "token", "create", "--tier", "micro", "--count", "3", "--ttl-h", "0.5", "--format", "json"
        )[1]
        made = json.loads(out)
        assert len({entry["join"] for entry in made}) == 3
        assert fedge("token", "revoke", made[0]["id"][:10])[0] == 0
        listed = json.loads(fedge("token", "ls", "--format", "json")[1])
        assert {entry["id"] for entry in listed} == {made[1]["id"], made[2]["id"]}
        assert {entry["state"] for entry in listed} == {"open"}
        assert made[1]["id"] in fedge("token", "ls")[1]

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (("--tier", "Micro"), "tier 'Micro'"),
            (("--tier", "micro", "--ttl-h", "0"), "lifetime 0 h"),
            (("--tier", "micro", "--ttl-h", "nan"), "lifetime nan h"),
            (("--tier", "micro", "--count", "0"), "--count 0"),
        ],
    )
    def test_nonsense_is_refused(self, home: Home, fedge: Fedge, words: tuple[str, ...], said: str) -> None:
        code, _, err = fedge("token", "create", *words)
        assert (code, said in err) == (2, True)
        assert json.loads(fedge("token", "ls", "--format", "json")[1]) == []

    def test_a_port_that_the_hub_chose_is_read_from_it(self, fedge: Fedge, tmp_path: Path) -> None:
        fedge("init", "--name", "localhost", "--enrolment-port", "0")
        code, _, err = fedge("token", "create", "--tier", "micro")
        assert (code, "once the hub is up" in err) == (2, True)
        (tmp_path / "home" / "ports.json").write_text('{"link": 1, "enrolment": 4567}')
        assert JoinString.parse(fedge("token", "create", "--tier", "micro")[1]).port == 4567


class TestDevices:
    A, B = "a1" * 32, "a2" * 32

    def test_are_listed_with_or_without_a_hub(self, home: Home, fedge: Fedge) -> None:
        assert fedge("devices", "ls")[1] == "no devices\n"
        devices(home, self.A, self.B)
        listed = json.loads(fedge("devices", "ls", "--format", "json")[1])
        assert [(row["id"], row["online"]) for row in listed] == [(self.A, None), (self.B, None)]
        assert "active" in fedge("devices", "ls")[1]

    def test_show_who_is_online_while_the_hub_is_up(self, home: Home, fedge: Fedge, hub: Admin) -> None:
        devices(home, self.A, self.B)
        listed = json.loads(fedge("devices", "ls", "--format", "json")[1])
        assert [row["online"] for row in listed] == [True, False]
        assert (listed[0]["tags"], listed[0]["tasks"]) == (["north"], ["digits"])
        assert "online" in fedge("devices", "show", "a1")[1]

    def test_a_prefix_names_a_device_when_only_one_begins_so(self, home: Home, fedge: Fedge) -> None:
        devices(home, self.A, self.B)
        assert json.loads(fedge("devices", "show", "a2", "--format", "json")[1])["id"] == self.B
        for which, said in (("a", "2 ids begin so"), ("b", "there is none"), ("", "there is none")):
            code, _, err = fedge("devices", "show", which)
            assert (code, said in err) == (2, True)

    def test_a_revocation_is_written_and_the_hub_is_told(self, home: Home, fedge: Fedge, hub: Admin) -> None:
        devices(home, self.A, self.B)
        code, out, _ = fedge("devices", "revoke", "a1", "--reason", "stolen", "--format", "json")
        assert (code, json.loads(out)["hub"], hub.refreshed) == (0, True, 1)
        row = json.loads(fedge("devices", "show", "a1", "--format", "json")[1])
        assert (row["status"], row["reason"]) == ("revoked", "stolen")

    def test_a_revocation_counts_also_when_no_hub_is_up(self, home: Home, fedge: Fedge) -> None:
        devices(home, self.A)
        code, out, _ = fedge("devices", "revoke", "a1")
        assert (code, "no hub is up" in out) == (0, True)

    def test_a_hub_that_does_not_answer_is_an_error_and_the_revocation_stands(
        self, home: Home, fedge: Fedge, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        devices(home, self.A)
        monkeypatch.setattr(control, "_PATIENCE_S", 0.1)
        with home.lock.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            code, _, err = fedge("devices", "revoke", "a1")
        assert (code, "is revoked in the database, but" in err) == (1, True)
        assert json.loads(fedge("devices", "show", "a1", "--format", "json")[1])["status"] == "revoked"


class TestRotation:
    def test_waits_for_devices_that_would_be_lost(self, home: Home, fedge: Fedge) -> None:
        devices(home, "a1" * 32)
        fedge("token", "create", "--tier", "micro")
        assert fedge("ca", "rotate")[0] == 0
        status = json.loads(fedge("ca", "status", "--format", "json")[1])
        assert (status["rotating"], status["lacking"]) == (True, ["a1" * 32])
        assert [ca["signs"] for ca in status["authorities"]] == [["the server"], ["devices"]]
        code, _, err = fedge("ca", "finish")
        assert (code, "1 device(s) do not know the new CA yet: a1a1a1a1" in err) == (2, True)
        with Registry.open(home.root) as registry:
            registry.devices.renewed("a1" * 32, time.time(), Authority.open(home.ca).bundle_digest)
        code, out, _ = fedge("ca", "finish")
        assert (code, "1 join string(s) that nobody has used" in out) == (0, True)
        shown = ServerCertificate.load(home.tls).certificate
        shown.verify_directly_issued_by(*Authority.open(home.ca).certificates)

    def test_can_be_forced(self, home: Home, fedge: Fedge, hub: Admin) -> None:
        devices(home, "a1" * 32)
        fedge("ca", "rotate")
        value = json.loads(fedge("ca", "finish", "--force", "--format", "json")[1])
        assert (value["lost"], value["rotating"], hub.refreshed) == (["a1" * 32], False, 2)

    def test_cannot_be_finished_before_it_began(self, home: Home, fedge: Fedge) -> None:
        code, _, err = fedge("ca", "finish")
        assert (code, "no rotation is under way" in err) == (2, True)


class TestEnroll:
    def test_makes_a_device_and_says_so_again(
        self, server: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = ["enroll", str(server.join()), "--home", str(tmp_path / "device")]
        assert client(words) == 0
        made = Identity.open(tmp_path / "device")
        assert capsys.readouterr().out.startswith(f"enrolled: device {made.device_id[:16]}, tier micro")
        assert client([*words, "--format", "json"]) == 0
        assert json.loads(capsys.readouterr().out)["new"] is False

    def test_reads_the_join_string_from_standard_input(
        self, server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("sys.stdin", io.StringIO(f"{server.join()}\n"))
        assert client(["enroll", "-", "--home", str(tmp_path / "device")]) == 0

    def test_mistakes_exit_with_2_and_outages_with_1(
        self, server: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        home = ["--home", str(tmp_path / "device")]
        used = server.join()
        client(["enroll", str(used), "--home", str(tmp_path / "other")])
        for join in ("nonsense", str(used), str(server.join(pin=Authority.create(tmp_path / "ca").pin))):
            assert client(["enroll", join, *home]) == 2
        join = str(server.join())
        server.stop()
        assert client(["enroll", join, *home]) == 1
        errors = capsys.readouterr().err.strip().splitlines()
        assert len(errors) == 4
        assert all(line.startswith("fedge-client: error: ") for line in errors)

    def test_a_revoked_device_needs_a_new_key(
        self, server: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        home = tmp_path / "device"
        client(["enroll", str(server.join()), "--home", str(home)])
        server.registry.devices.revoke(Identity.open(home).device_id, "lost")
        (home / "identity" / "hub.json").unlink()
        assert client(["enroll", str(server.join()), "--home", str(home)]) == 2
        assert "to enrol this device with a new key" in capsys.readouterr().err
        shutil.rmtree(home / "identity")
        assert client(["enroll", str(server.join()), "--home", str(home)]) == 0
