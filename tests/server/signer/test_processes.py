"""Signers that are processes: who may ask, what they make of any bytes, and kills at any moment."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from places import Client, Place, release_of, report_of
from tuf.api.metadata import Metadata

from fedge.errors import FedgeError, RefusedError, SignerAwayError, UserError
from fedge.wire.v1 import signer_pb2 as pb
from fedge_server.cli import main
from fedge_server.repository import FileSigning, RoleKeys, create_key, load_key
from fedge_server.repository.content_keys import ContentKeys
from fedge_server.signer import frames
from fedge_server.signer.judging import Judge
from fedge_server.signer.memory import Memory, version_of
from fedge_server.signer.remote import RemoteSigning
from fedge_server.signer.service import answer, serving

NOBODY = 65534


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short name that every user may enter."""
    made = Path(tempfile.mkdtemp(prefix="fs"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


def online(place: Place) -> list[Any]:
    return [*place.keys["snapshot"], *place.keys["timestamp"]]


@contextmanager
def signer(place: Place, folder: Path) -> Iterator[RemoteSigning]:
    judge = Judge(
        "micro", place.keys["tier-micro"][0], Memory(folder / "memory", "tier-micro"), clock=place.clock
    )
    with serving(judge, folder / "s", [os.geteuid()]):
        yield RemoteSigning(folder / "s")


def test_a_release_is_signed_over_the_socket(place, folder):
    with signer(place, folder) as remote:
        assert (remote.tier, remote.version) == ("micro", 0)
        assert remote.key.keyid == place.keys["tier-micro"][0].key.keyid
        assert (folder / "s").stat().st_mode & 0o777 == 0o660
        assert place.publish(1, "micro", signing=[remote, *online(place)]).version == 1
        assert RemoteSigning(folder / "s").version == 2
    assert not (folder / "s").exists()
    (folder / "device").mkdir()
    assert Client(folder / "device", place).mark().newest == 1


def test_a_refusal_comes_back_with_its_reasons(place, folder):
    place.options["policy"] = lambda _: ()
    draft, objects = release_of(1, "micro", report=report_of(passed=False))
    before = place.repository.content("micro")
    refused = pytest.raises(RefusedError, match=r"tier-micro: not signed: .*gate has not passed")
    with signer(place, folder) as remote, refused as caught:
        place.repository.publish(draft, objects, [remote, *online(place)])
    assert caught.value.role == "tier-micro"
    assert place.repository.content("micro") == before


@pytest.mark.slow
def test_a_sealed_model_is_opened_by_the_signer_which_sees_each_ciphertext_once(place, folder):
    place.options["content_keys"] = ContentKeys(folder / "content")
    with signer(place, folder) as remote:
        sizes = []
        ask = remote._ask
        remote._ask = lambda asked, *rest: (
            sizes.append([each.HasField("sealed") for each in asked.sign.evidence]) or ask(asked, *rest)
        )
        for number in (1, 2, 3):
            place.publish(number, "micro", signing=[remote, *online(place)])
        assert sizes == [[True], [False, True], [False, False, True]]
    with signer(place, folder) as fresh:
        assert fresh.version == 4
        (folder / "memory" / "tier-micro.json").unlink()
        fresh.version = 0
        assert place.publish(4, "micro", signing=[fresh, *online(place)]).version == 4
    with signer(place, folder) as remote:
        place.options["policy"] = lambda _: ()
        draft, objects = release_of(5, "micro")
        forged = ContentKeys(folder / "content")
        forged.sealed = lambda wire, tier, version: ContentKeys.sealed(forged, b"other", tier, version)
        place.options["content_keys"] = forged
        with pytest.raises(RefusedError, match="its sealed model is not the manifest's variant"):
            place.repository.publish(draft, objects, [remote, *online(place)])


def test_another_user_gets_no_word(place, folder):
    judge = Judge("micro", place.keys["tier-micro"][0], Memory(folder / "memory", "tier-micro"))
    nothing = pytest.raises(SignerAwayError, match=r"ended after 0 of 4 bytes|Connection reset|Broken pipe")
    with serving(judge, folder / "s", [os.geteuid() + 1]), nothing:
        RemoteSigning(folder / "s")


@pytest.mark.slow
def test_the_online_keys_alone_ship_nothing(place, folder):
    """With the signer gone there is no signature for the tier, and nothing changes."""
    with signer(place, folder) as remote:
        place.publish(1, "micro", signing=[remote, *online(place)])
    before = place.files()
    with pytest.raises(SignerAwayError, match="does not answer"):
        place.publish(2, "micro", signing=[remote, *online(place)])
    with pytest.raises(UserError, match="0 of 1 signatures"):
        place.publish(2, "micro", signing=online(place))
    assert place.files() == before


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00\x00",
        struct.pack(">I", 5) + b"ab",
        struct.pack(">I", 2**32 - 1),
        struct.pack(">I", 3) + b"\xff\xff\xff",
        struct.pack(">I", 0),
        b"GET / HTTP/1.1\r\n\r\n",
    ],
)
def test_no_bytes_stop_a_signer(place, folder, data):
    with signer(place, folder) as remote:
        with socket.socket(socket.AF_UNIX) as channel:
            channel.settimeout(10)
            channel.connect(str(folder / "s"))
            channel.sendall(data)
            channel.shutdown(socket.SHUT_WR)
            with suppress(ConnectionError):  # what was not read is thrown away
                while channel.recv(4096):
                    pass
        assert place.publish(1, "micro", signing=[remote, *online(place)]).version == 1


@given(st.binary(max_size=200), st.integers(0, 5))
def test_any_request_gets_a_reply_and_none_but_a_good_one_a_signature(data, cut):
    key = FileSigning(Ed25519PrivateKey.from_private_bytes(bytes(32)))
    judge = Judge("micro", key, Memory(Path("/nonexistent"), "tier-micro"))
    asked = pb.SignerRequest(sign=pb.SignRole(role="tier-micro", payload=data, previous=data[cut:]))
    for request in (data, asked.SerializeToString(), asked.SerializeToString()[cut:]):
        assert answer(judge, request).WhichOneof("answered") in ("refusal", "failure", "description")


@pytest.mark.slow
def test_a_signer_loads_neither_a_network_stack_nor_what_learns():
    code = (
        "import sys, fedge_server.cli.signer, fedge_server.signer.service, fedge_server.signer.limits;"
        "print(sorted({'grpc', 'torch', 'flwr', 'onnx', 'onnxruntime'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


@pytest.mark.slow
def test_peers_that_stall_keep_nobody_out_for_long(place, folder, monkeypatch):
    from fedge_server.signer import service

    monkeypatch.setattr(service, "TIMEOUT_S", 0.2)
    with signer(place, folder) as remote:
        stalled = [socket.socket(socket.AF_UNIX) for _ in range(3 * service.MAX_CONNECTIONS)]
        for channel in stalled:
            channel.setblocking(False)
            with suppress(BlockingIOError):
                channel.connect(str(folder / "s"))
        assert RemoteSigning(folder / "s", timeout_s=20).tier == remote.tier
        for channel in stalled:
            channel.close()


def test_a_server_that_lies_about_its_length_is_not_believed(folder):
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(folder / "s"))
        listening.listen()
        pid = os.fork()
        if pid == 0:
            channel, _ = listening.accept()
            channel.sendall(struct.pack(">I", frames.MAX_REPLY_BYTES + 1))
            os._exit(0)
        with pytest.raises(SignerAwayError, match="over the 65536 it may have"):
            RemoteSigning(folder / "s")
        os.waitpid(pid, 0)


def in_child(work: Callable[[], object]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            code = work()
            os._exit(code if isinstance(code, int) else 0)
        except FedgeError:
            os._exit(1)
        except Exception:  # noqa: BLE001 - nothing of the parent may go on in a child
            traceback.print_exc(file=sys.__stderr__)
        finally:
            os._exit(9)
    return pid


def signer_process(place: Place, folder: Path) -> int:
    def work() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with signer(place, folder):
            time.sleep(600)

    pid = in_child(work)
    waited_for(folder / "s")
    return pid


def waited_for(path: Path) -> RemoteSigning:
    end = time.monotonic() + 30
    while time.monotonic() < end:
        try:
            return RemoteSigning(path)
        except SignerAwayError:
            time.sleep(0.01)
    raise AssertionError("the signer did not come up")


def check_whole(place: Place, folder: Path, seen: dict[str, bytes], number: int) -> None:
    """What is there is whole; no name was given twice; the signer remembers no less than was published."""
    for name, data in place.files().items():
        if not name.endswith("timestamp.json"):
            assert seen.setdefault(name, data) == data
    state = place.repository.content("micro")
    memory = Memory(folder / "memory", "tier-micro").last()
    published = max(
        place.path.glob("metadata/*.tier-micro.json"), key=lambda p: int(p.name.partition(".")[0])
    )
    if state.mark.newest:
        assert memory is not None
        assert version_of(memory) >= Metadata.from_file(str(published)).signed.version
        (folder / f"d{number}").mkdir()
        assert Client(folder / f"d{number}", place).mark().newest == state.mark.newest


@pytest.mark.slow
def test_kills_of_publisher_and_signer_at_random_moments_leave_the_old_or_the_new(place, folder):
    rng, seen, newest = random.Random(0), {}, 0
    running = signer_process(place, folder)
    try:
        for number in range(1, 25):

            def publish(number: int = number) -> None:
                remote = RemoteSigning(folder / "s", timeout_s=5)
                place.publish(number, "micro", signing=[remote, *online(place)])

            publisher = in_child(publish)
            time.sleep(rng.uniform(0, 0.12))
            if number % 2:
                os.kill(publisher, signal.SIGKILL)
            else:
                os.kill(running, signal.SIGKILL)
                os.waitpid(running, 0)
                running = 0
            os.waitpid(publisher, 0)
            running = running or signer_process(place, folder)
            check_whole(place, folder, seen, number)
            now = place.repository.content("micro").mark.newest
            assert now >= newest
            newest = now
        place.publish(99, "micro", signing=[RemoteSigning(folder / "s"), *online(place)])
        check_whole(place, folder, seen, 99)
    finally:
        os.kill(running, signal.SIGKILL)
        os.waitpid(running, 0)


@pytest.mark.slow
def test_two_publishers_at_once_get_two_versions(place, folder):
    running = signer_process(place, folder)
    try:

        def publish(number: int) -> None:
            remote = RemoteSigning(folder / "s")
            for each in range(3):
                place.publish(10 * number + each, "micro", signing=[remote, *online(place)])

        children = [in_child(lambda number=number: publish(number)) for number in (1, 2)]
        assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0]
        assert place.repository.content("micro").mark.newest == 6
        assert list(place.repository.content("micro").releases) == [3, 4, 5, 6]
    finally:
        os.kill(running, signal.SIGKILL)
        os.waitpid(running, 0)


def arguments(folder: Path, *further: str) -> list[str]:
    return [
        "signer", "serve", "--key", str(folder / "own/tier-micro.key"), "--socket", str(folder / "run/s"),
        "--memory", str(folder / "own/memory"), *further,
    ]  # fmt: skip


def as_nobody(work: Callable[[], object]) -> Callable[[], object]:
    """In a child that has read its modules already: another user may not be able to."""

    def run() -> object:
        os.setgroups([])
        os.setgid(os.getegid())
        os.setuid(NOBODY)
        return work()

    return run


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_signer_of_another_user_signs_for_the_publisher_alone(folder, place):
    (folder / "own").mkdir(mode=0o700)
    (folder / "run").mkdir()
    made = create_key(folder / "own/tier-micro.key")
    for path in (folder / "own", folder / "own/tier-micro.key", folder / "run"):
        os.chown(path, NOBODY, os.getegid())
    place.repository.rotate("tier-micro", RoleKeys((made.key,)), [*place.all(), made])
    with signer(place, folder):
        publisher = os.geteuid()

    def serve() -> None:
        memory = Memory(folder / "own/memory", "tier-micro")
        key = load_key(folder / "own/tier-micro.key")
        with serving(Judge("micro", key, memory, clock=place.clock), folder / "run/s", [publisher]):
            signal.pause()

    running = in_child(as_nobody(serve))
    try:
        remote = waited_for(folder / "run/s")
        assert place.publish(1, "micro", signing=[remote, *online(place)]).version == 1
        assert (folder / "own/memory/tier-micro.json").stat().st_uid == NOBODY
        asked = in_child(as_nobody(lambda: RemoteSigning(folder / "run/s")))
        assert os.waitstatus_to_exitcode(os.waitpid(asked, 0)[1]) == 1, "its own user was not named"
    finally:
        os.kill(running, signal.SIGKILL)
        os.waitpid(running, 0)


@pytest.mark.slow
def test_the_command_serves_until_it_is_asked_to_end(folder, capsys):
    for name in ("own", "run"):
        (folder / name).mkdir()
    made = create_key(folder / "own/tier-micro.key")
    command = [sys.executable, "-m", "fedge_server", *arguments(folder)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        waited_for(folder / "run/s")
        assert main(["signer", "show", "--socket", str(folder / "run/s"), "--format", "json"]) == 0
        (shown,) = json.loads(capsys.readouterr().out)
        assert (shown["tier"], shown["key"], shown["version"]) == ("micro", made.key.keyid, 0)
        assert main(arguments(folder)) == 2
        assert "another signer of tier 'micro' uses it" in capsys.readouterr().err
        process.terminate()
        assert "signing for tier micro with key" in process.communicate(timeout=30)[1]
        assert process.returncode == 0
    assert not (folder / "run/s").exists()
    assert main(["signer", "show", "--socket", str(folder / "run/s")]) == 1


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda own: (own / "tier-micro.key").chmod(0o644), "others may read it"),
        (lambda own: (own / "tier-micro.key").unlink(), "cannot be read"),
        (lambda own: (own / "memory").mkdir() or (own / "memory/tier-micro.json").write_text("x"), "version"),
        (lambda own: (own / "memory").mkdir() or (own / "memory").chmod(0o770), "others may write it"),
    ],
)
def test_a_signer_that_cannot_be_one_says_why(folder, capsys, change, why):
    (folder / "own").mkdir()
    create_key(folder / "own/tier-micro.key")
    change(folder / "own")
    assert main(arguments(folder)) in (1, 2)
    assert why in capsys.readouterr().err
