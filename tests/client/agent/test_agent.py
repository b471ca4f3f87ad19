"""Real agent processes with their training processes, against a hub that does what a test says."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from fedge.wire.v1 import link_pb2 as pb

pytestmark = pytest.mark.slow

Wait = Callable[..., Any]


def reason_of(hub: Any, message_id: str) -> str:
    result, data = hub.answer(message_id)
    assert result.WhichOneof("kind") == "failure", result
    assert data == b""
    return str(result.failure.reason)


def is_done(hub: Any, message_id: str) -> None:
    result, _ = hub.answer(message_id)
    assert result.WhichOneof("kind") == "content", result


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_an_agent_connects_trains_in_its_child_and_submits(
    hub: Any, agent: Any, training: Any, wait: Wait
) -> None:
    agent.start()
    hello = hub.hellos[0]
    assert [task.name for task in hello.tasks] == ["digits"]
    assert (hello.wire_version, len(hello.bundle_sha256)) == (2, 32)
    assert agent.child is None  # torch is loaded at the first work
    message, data = training("m1")
    hub.train(message, data)
    result, answer = hub.answer("m1")
    assert result.WhichOneof("kind") == "content", result
    assert len(answer) == len(data)
    assert answer != data
    assert result.seconds > 0
    message.work.message_id = "m2"  # the same model again
    hub.send(message)
    assert hub.answer("m2")[1] == answer  # the seed decides
    assert hub.fetches == [("m1", 0)]
    wait(lambda: not list((agent.home / "outbox").iterdir()))  # the hub knew of the answer a moment earlier
    assert agent.terminate() == 0
    assert agent.status["state"] == "stopped"


def test_a_child_that_is_killed_is_replaced_and_the_message_run_again(
    hub: Any, agent: Any, training: Any, own_task: Any, wait: Wait
) -> None:
    go, reading = own_task(), agent.home / "reading"
    agent.start()
    hub.train(*training("m1", "own:TASK", hub.digest_of("own:TASK")))
    wait(reading.exists)
    first = agent.child
    os.kill(first, signal.SIGKILL)
    wait(lambda: agent.child not in (None, first))
    go.touch()
    is_done(hub, "m1")


def test_a_message_that_kills_its_child_twice_is_answered_with_a_failure(
    hub: Any, agent: Any, training: Any, own_task: Any, ping: Any
) -> None:
    own_task(middle="os.kill(os.getpid(), 9)")
    agent.start()
    digest = hub.digest_of("own:TASK")
    hub.train(*training("m1", "own:TASK", digest))
    assert reason_of(hub, "m1") == "training process died (signal 9, SIGKILL)"
    hub.send(ping("m2", task="own:TASK", task_digest=digest))
    is_done(hub, "m2")


def test_an_answer_survives_the_agent_and_is_not_trained_again(
    hub: Any, agent: Any, training: Any, wait: Wait
) -> None:
    hub.refuse_submits = True
    agent.start()
    hub.train(*training("m1"))
    wait(lambda: hub.submits)
    child = agent.child
    agent.kill()
    wait(lambda: not is_alive(child))  # it ends with its agent
    hub.refuse_submits = False
    agent.start()
    assert list(hub.hellos[-1].working_on) == ["m1"]
    is_done(hub, "m1")
    wait(lambda: list((agent.home / "outbox").iterdir()) == [])
    assert agent.log.count("train m1: done") == 1
    assert agent.child is None


def test_an_agent_killed_while_it_trains_is_sent_the_message_again(
    hub: Any, agent: Any, training: Any, own_task: Any, wait: Wait
) -> None:
    go, reading = own_task(), agent.home / "reading"
    agent.start()
    message, data = training("m1", "own:TASK", hub.digest_of("own:TASK"))
    hub.train(message, data)
    wait(reading.exists)
    child = agent.child
    agent.kill()
    wait(lambda: not is_alive(child))
    agent.start()
    assert list(hub.hellos[-1].working_on) == []
    go.touch()
    hub.send(message)
    hub.send(message)  # as after a break: the id tells
    is_done(hub, "m1")
    hub.send(pb.HubMessage(cancel=pb.Cancel(message_id="unknown")))
    assert agent.log.count("train m1: done") == 1
    assert hub.fetches == [("m1", 0)]  # the model was on the disk


def test_a_cancelled_message_ends_and_the_child_lives_on(
    hub: Any, agent: Any, training: Any, own_task: Any, ping: Any, wait: Wait
) -> None:
    own_task()
    agent.start()
    digest = hub.digest_of("own:TASK")
    hub.train(*training("m1", "own:TASK", digest))
    hub.send(ping("m2", task="own:TASK", task_digest=digest))
    hub.send(ping("m3", task="own:TASK", task_digest=digest))
    wait((agent.home / "reading").exists)
    child = agent.child
    hub.send(pb.HubMessage(cancel=pb.Cancel(message_id="m3")))  # waits in the queue
    hub.send(pb.HubMessage(cancel=pb.Cancel(message_id="m1")))
    is_done(hub, "m2")
    agent.logged("message m1: cancelled")
    assert agent.child == child
    assert set(hub.answers) == {"m2"}


def test_work_that_does_not_end_when_cancelled_is_killed(
    hub: Any, agent: Any, training: Any, own_task: Any, ping: Any, wait: Wait
) -> None:
    own_task(top="import signal", middle="signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])")
    agent.start()
    digest = hub.digest_of("own:TASK")
    hub.train(*training("m1", "own:TASK", digest))
    wait((agent.home / "reading").exists)
    child = agent.child
    hub.send(pb.HubMessage(cancel=pb.Cancel(message_id="m1")))
    wait(lambda: not is_alive(child))
    hub.send(ping("m2", task="own:TASK", task_digest=digest))
    is_done(hub, "m2")


def test_a_message_past_its_deadline_is_given_up(
    hub: Any, agent: Any, training: Any, own_task: Any, ping: Any
) -> None:
    own_task()
    agent.start()
    digest = hub.digest_of("own:TASK")
    message, data = training("m1", "own:TASK", digest, seconds_left=1.0)
    hub.train(message, data)
    agent.logged("message m1: no answer before its deadline")
    hub.send(ping("m2", task="own:TASK", task_digest=digest))
    is_done(hub, "m2")
    assert "m1" not in hub.answers


def test_an_idle_child_is_unloaded_and_comes_back(hub: Any, agent: Any, ping: Any, wait: Wait) -> None:
    agent.write({"digits": {"data": "digits.npz"}}, training={"idle_unload_s": 0.2})
    agent.start()
    hub.send(ping("m1"))
    is_done(hub, "m1")
    wait(lambda: agent.child is None)
    agent.logged("unloaded: no work")
    hub.send(ping("m2"))
    is_done(hub, "m2")


def test_what_needs_too_much_memory_is_a_failure(
    hub: Any, agent: Any, training: Any, own_task: Any, ping: Any
) -> None:
    own_task(middle="bytearray(10**9)", training={"max_memory_bytes": 600_000_000})
    agent.start()
    digest = hub.digest_of("own:TASK")
    hub.train(*training("m1", "own:TASK", digest))
    assert reason_of(hub, "m1").startswith("out of memory: the message needs more than")
    hub.send(ping("m2", task="own:TASK", task_digest=digest))
    is_done(hub, "m2")


def test_a_task_that_is_not_offered_is_refused_and_nothing_of_it_imported(
    hub: Any, agent: Any, training: Any
) -> None:
    (agent.home / "evil.py").write_text("import pathlib\npathlib.Path(__file__).with_name('ran').touch()\n")
    agent.start()
    hub.train(*training("m1", "evil:TASK"))
    assert "task 'evil:TASK' is not offered here; this device offers ['digits']" in reason_of(hub, "m1")
    assert agent.child is None
    assert hub.fetches == []
    # Past the agent, too: a Work for the offered task whose instructions name another.
    message, data = training("m2", "evil:TASK")
    message.work.task = "digits"
    hub.train(message, data)
    assert "task 'evil:TASK' is not offered here; this device offers 'digits'" in reason_of(hub, "m2")
    assert not (agent.home / "ran").exists()


def test_another_digest_is_refused_and_both_are_named(hub: Any, agent: Any, training: Any) -> None:
    agent.start()
    own = hub.digest_of("digits")
    hub.train(*training("m1", digest="ab" * 32))
    assert own in reason_of(hub, "m1")
    assert "ab" * 32 in reason_of(hub, "m1")
    message, data = training("m2", digest="cd" * 32)
    message.work.task_digest = own
    hub.train(message, data)
    assert own in reason_of(hub, "m2")
    assert "cd" * 32 in reason_of(hub, "m2")


def test_an_object_that_is_not_the_announced_one_is_a_failure(hub: Any, agent: Any, ping: Any) -> None:
    agent.start()
    cases = {"m1": b"other bytes", "m2": b"right bytes and more", "m3": b"right"}
    reasons = []
    for message_id, sent in cases.items():
        message = ping(message_id, b"right bytes")
        hub.objects[message.work.content.object.sha256] = sent
        hub.send(message)
        reasons.append(reason_of(hub, message_id))
    assert "do not have the digest" in reasons[0]
    assert "announced with 11 bytes, but more came" in reasons[1]
    assert "announced with 11 bytes, but only 5 came" in reasons[2]
    assert list((agent.home / "cache" / "objects").iterdir()) == []
    hub.train(ping("m4", b"right bytes"), b"right bytes")
    is_done(hub, "m4")


def test_transfers_go_on_where_they_broke_off(hub: Any, agent: Any, ping: Any, training: Any) -> None:
    agent.start()
    data = os.urandom(1_000_000)
    hub.break_fetch_after = 500_000
    hub.train(ping("m1", data), data)
    is_done(hub, "m1")
    assert [offset for _, offset in hub.fetches] == [0, 524_288]
    hub.break_submit_after = 1
    hub.train(*training("m2", model="cnn"))
    is_done(hub, "m2")
    offsets = [offset for message_id, offset in hub.submits if message_id == "m2"]
    assert offsets[0] == 0
    assert offsets[1] > 0


def test_a_small_answer_that_broke_off_is_sent_again_whole(hub: Any, agent: Any, training: Any) -> None:
    agent.start()
    hub.break_submit_after = 1
    hub.train(*training("m1"))
    is_done(hub, "m1")
    assert [offset for _, offset in hub.submits] == [0, 0]


def test_a_large_object_travels_over_a_connection_that_ends_with_it(
    hub: Any, agent: Any, training: Any, wait: Wait
) -> None:
    agent.start()
    hub.train(*training("m1"))
    is_done(hub, "m1")
    resident = hub.peers["Connect"]
    assert hub.peers["Fetch"] == hub.peers["Submit"] == resident
    assert hub.turns == []
    assert len(resident) == 1
    hub.peers.clear()
    hub.not_yet = 1  # so that each turn is asked for twice
    hub.train(*training("m2", model="cnn"))
    is_done(hub, "m2")
    kinds = (pb.TurnRequest.FETCH, pb.TurnRequest.SUBMIT)
    assert hub.turns == [("m2", kind) for kind in kinds for _ in range(2)]
    assert hub.peers["Turn"] == resident
    assert len(resident | hub.peers["Fetch"] | hub.peers["Submit"]) == 3
    wait(lambda: hub.connections() == 1, "only the resident connection is open")


def test_a_cancelled_message_closes_its_transfers_connection(
    hub: Any, agent: Any, ping: Any, wait: Wait
) -> None:
    agent.start()
    data = os.urandom(1_000_000)
    hub.hang_fetch_after = 500_000
    hub.train(ping("m1", data), data)
    wait(lambda: hub.connections() == 2, "a connection for the transfer")
    wait(lambda: hub.fetches)
    hub.send(pb.HubMessage(cancel=pb.Cancel(message_id="m1")))
    wait(lambda: hub.connections() == 1, "only the resident connection is open")


def test_a_closed_message_is_not_moved_when_its_turn_comes(
    hub: Any, agent: Any, ping: Any, wait: Wait
) -> None:
    agent.start()
    hub.closed.add("m1")
    hub.train(ping("m1", bytes(1_000_000)), bytes(1_000_000))
    wait(lambda: hub.turns)
    wait(lambda: not agent.status["working"])
    assert hub.fetches == []
    hub.send(ping("m2"))
    is_done(hub, "m2")


def test_an_older_hub_is_told_apart(hub: Any, agent: Any, wait: Wait) -> None:
    hub.wire_version = 1
    agent.start()
    wait(lambda: "speaks wire version 1, this device needs 2" in agent.status["detail"])


@pytest.mark.parametrize("outcome", ["TOO_LATE", "REFUSED"])
def test_an_answer_that_nobody_wants_is_dropped(
    outcome: str, hub: Any, agent: Any, ping: Any, wait: Wait
) -> None:
    hub.outcome = pb.SubmitReply.Outcome.Value(outcome)
    agent.start()
    hub.send(ping("m1"))
    agent.logged(f"answer to m1: {outcome}")
    wait(lambda: list((agent.home / "outbox").iterdir()) == [])


def test_an_agent_comes_back_when_its_server_does(hub: Any, agent: Any, ping: Any, wait: Wait) -> None:
    agent.start()
    hub.stop()
    wait(lambda: agent.status["state"] == "waiting")
    hub.start()
    wait(lambda: len(hub.hellos) == 2)
    hub.send(ping("m1"))
    is_done(hub, "m1")
    assert agent.status["state"] == "connected"


def test_a_device_that_is_refused_keeps_trying_slowly_and_says_so(hub: Any, agent: Any, wait: Wait) -> None:
    hub.refuse = grpc.StatusCode.PERMISSION_DENIED
    agent.start(wait=False)
    wait(lambda: agent.status["state"] == "refused")
    assert "device: revoked" in agent.status["detail"]
    assert agent.process.poll() is None
    assert agent.terminate() == 0
    agent.start("--once", wait=False)
    assert agent.process.wait(60) == 1


def test_once_does_what_waits_and_ends(hub: Any, agent: Any, ping: Any) -> None:
    agent.start("--once")
    hub.send(ping("m1"))
    is_done(hub, "m1")
    assert agent.process.wait(60) == 0


def test_a_second_agent_in_the_same_home_is_refused(hub: Any, agent: Any) -> None:
    agent.start()
    first = agent.process
    agent.start(wait=False)
    assert agent.process.wait(60) == 1
    assert "an agent runs here already" in agent.log
    agent.process = first
    assert agent.terminate() == 0


def test_a_new_bundle_is_kept_and_shown_in_the_next_hello(hub: Any, agent: Any, wait: Wait) -> None:
    agent.start()
    hub.authority.rotate()
    hub.send(pb.HubMessage(new_bundle=pb.NewBundle(ca_bundle=hub.authority.bundle)))
    wait(lambda: (agent.home / "identity" / "ca.pem").read_bytes() == hub.authority.bundle)
    hub.stop()
    hub.start()
    wait(lambda: len(hub.hellos) == 2)
    assert hub.hellos[1].bundle_sha256 == bytes.fromhex(hub.authority.bundle_digest)


def test_systemd_is_told_when_the_agent_is_ready(hub: Any, agent: Any, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(30)
        agent.environment["NOTIFY_SOCKET"] = str(tmp_path / "notify")
        agent.start()
        assert systemd.recv(1000).startswith(b"READY=1")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a tmpfs needs the superuser")
def test_a_full_disk_fails_the_message_and_leaves_the_cache_sound(hub: Any, agent: Any, ping: Any) -> None:
    cache = agent.home / "cache"
    cache.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(cache)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("this machine does not let us mount a tmpfs")
    try:
        agent.start()
        small, big = os.urandom(600_000), os.urandom(3_000_000)
        hub.train(ping("m1", small), small)
        is_done(hub, "m1")
        hub.train(ping("m2", big), big)
        assert "no room" in reason_of(hub, "m2")
        hub.train(ping("m3", small), small)
        is_done(hub, "m3")
        assert {path.name for path in (cache / "objects").iterdir()} <= {hashlib.sha256(small).hexdigest()}
        agent.terminate()
    finally:
        subprocess.run(["umount", "-l", str(cache)], check=True)
