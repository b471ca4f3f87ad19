"""Hostile devices with real certificates: each is rejected and recorded, and the round goes on without it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import devices
import grpc
import grpc.aio
import hostility
import pytest
from devices import Answer, Devices, Identity, RawDevice
from federation import Agent, Federation, memory_mb, wait_for

from fedge.task_digest import task_digest
from fedge.wire.v1 import link_pb2

HONEST = 3
ROUNDS = 2
HUB_MB, WORKER_MB = 200, 1000  # highest resident memory; a worker without work has about 450 (torch)

# What a device does, and a part of the reason that the record gives; "": any reason will do.
HOSTILE: dict[str, tuple[Answer, str]] = {
    "NaN": (hostility.not_finite, "NaN"),
    "infinite loss": (hostility.absurd_loss, "train_loss"),
    "another shape": (hostility.other_shape, "instead of"),
    "a shape to broadcast": (hostility.broadcast, "instead of"),
    "an extra name": (hostility.extra_name, "array names differ: backdoor.weight"),
    "0 examples": (hostility.examples_of(0), "num-examples is 0"),
    "-1 examples": (hostility.examples_of(-1), "num-examples is -1"),
    "1e12 examples": (hostility.examples_of(10**12), "num-examples is 1000000000000"),
    "half an example": (hostility.examples_of(0.5), "num-examples is 0.5"),
    "NaN examples": (hostility.examples_of(float("nan")), "num-examples is nan"),
    "a dtype to unpickle": (hostility.object_dtype, ""),
    "a shape of 2^62": (hostility.huge_shape, ""),
    "declares 2 GB": (hostility.declares_two_gb, ""),
    "sends 2 GB": (hostility.sends_two_gb, ""),
    "too few bytes": (hostility.too_little, ""),
    "other bytes": (hostility.other_bytes, ""),
    "garbage": (hostility.garbage, ""),
    "no answer inside": (hostility.empty, ""),
    "many values": (hostility.many_values, ""),
    "nested lists": (hostility.nested, ""),
    "an ugly failure": (hostility.ugly_failure, "client error"),
    "silence": (hostility.silent, ""),
    "a slow loris": (hostility.slow_loris, ""),
}
MAY_BE_SILENT = {"silence", "a slow loris", "too few bytes"}  # no answer has come: nothing to record but that


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a run with all of them."""

    federation: Federation
    agents: dict[str, Agent]
    raw: dict[str, RawDevice]
    rounds: list[tuple[int, dict[str, Any], str]]
    hub_mb: float
    worker_mb: float

    def reasons(self, name: str) -> list[str]:
        """Why answers of this device were rejected, in all rounds."""
        node = self.agents[name].node_id
        return [
            item["reason"]
            for _, record, _ in self.rounds
            for item in record["rejected"]
            if item["client"] == node
        ]


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    with Federation(tmp_path_factory.mktemp("federation"), agents=0) as made:
        yield made


@pytest.fixture(scope="module")
def raw() -> Iterator[Devices]:
    with Devices() as made:
        yield made


def enrolled(federation: Federation, names: list[str]) -> dict[str, Agent]:
    """Devices with real certificates."""
    first, joins = len(federation.devices), federation.join_strings(len(names))
    found = [federation.enrol(f"device-{first + i}", join=join) for i, join in enumerate(joins)]
    return dict(zip(names, found, strict=True))


def raw_device(agent: Agent, answer: Answer, **more: Any) -> RawDevice:
    return RawDevice(Identity.of_home(agent.home), {"digits": task_digest("digits")}, answer, **more)


@pytest.fixture(scope="module")
def outcome(federation: Federation, raw: Devices) -> Outcome:
    """One run of two rounds in which all of them take part, beside honest devices."""
    answers = {f"honest {i}": devices.echo for i in range(HONEST - 1)} | {"twice": hostility.twice}
    answers |= {name: answer for name, (answer, _) in HOSTILE.items()}
    agents = enrolled(federation, list(answers))
    started = {name: raw_device(agents[name], answer) for name, answer in answers.items()}
    for device in started.values():
        raw.start(device)
    wait_for(lambda: len(federation.online()) == len(agents), "all are online")
    run_id = federation.start_run(
        {"rounds": {"count": ROUNDS, "deadline_s": 12.0}, "model": {"standardise": False}}
    )
    peak = Peak(federation, run_id)
    federation.wait_run(run_id, timeout_s=240)
    assert federation.hub is not None
    hub_mb = memory_mb(federation.hub.pid, "VmHWM")
    return Outcome(federation, agents, started, federation.rounds(run_id), hub_mb, peak.stop())


class Peak:
    """The highest memory of a run's worker, looked at while it lives."""

    def __init__(self, federation: Federation, run_id: str) -> None:
        self._federation, self._run_id, self._mb = federation, run_id, 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        pid = wait_for(lambda: self._federation.worker(self._run_id), "the run has a worker")
        while not self._ended.wait(0.1):
            try:
                self._mb = max(self._mb, memory_mb(pid, "VmHWM"))
            except OSError:
                return  # it has ended

    def stop(self) -> float:
        self._ended.set()
        self._thread.join()
        return self._mb


@pytest.mark.slow
def test_all_rounds_count_with_the_honest_devices_alone(outcome: Outcome) -> None:
    assert [number for number, _, _ in outcome.rounds] == list(range(ROUNDS + 1))
    for _, record, _ in outcome.rounds[1:]:
        assert record["counted"]
        assert record["clients"] == HONEST
        assert record["asked"] == HONEST + len(HOSTILE)


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_device_is_recorded_with_its_reason(outcome: Outcome, name: str) -> None:
    reasons = outcome.reasons(name)
    if name not in MAY_BE_SILENT:
        assert len(reasons) == ROUNDS, (reasons, outcome.raw[name].outcomes, outcome.raw[name].failures)
    for reason in reasons:
        assert HOSTILE[name][1] in reason
        assert reason.isprintable()
        assert 0 < len(reason) <= 300


@pytest.mark.slow
def test_an_honest_device_is_not_blamed(outcome: Outcome) -> None:
    assert [outcome.reasons(name) for name in outcome.agents if name.startswith("honest")] == [[]] * (
        HONEST - 1
    )


@pytest.mark.slow
def test_a_second_answer_does_not_count(outcome: Outcome) -> None:
    assert outcome.reasons("twice") == []
    first, second, *_ = outcome.raw["twice"].outcomes
    assert first.outcome == link_pb2.SubmitReply.ACCEPTED
    dropped = (link_pb2.SubmitReply.TOO_LATE, link_pb2.SubmitReply.REFUSED)
    assert second.outcome in dropped or second.reason == "it had arrived before"


@pytest.mark.slow
def test_memory_of_hub_and_worker_stays_bounded(outcome: Outcome) -> None:
    assert outcome.hub_mb < HUB_MB
    assert 0 < outcome.worker_mb < WORKER_MB


@pytest.mark.slow
def test_a_device_cannot_touch_the_message_of_another(
    federation: Federation, raw: Devices, outcome: Outcome
) -> None:
    agents = enrolled(federation, ["victim", "thief"])
    held = threading.Event()

    async def hold(device: RawDevice, work: link_pb2.Work) -> None:
        held.set()

    victim = raw_device(agents["victim"], hold, tags=["victim"])
    thief = raw_device(agents["thief"], hold, tags=["thief"])
    for device in (victim, thief):
        raw.start(device)
    run_id = federation.start_run(
        {"rounds": {"count": 1, "deadline_s": 20.0, "min_updates": 1}, "model": {"standardise": False}}
    )
    wait_for(lambda: victim.received, "the victim has a message")
    work = victim.received[0]
    for call in (
        collected(thief, work),
        thief.submit(work, b"", devices.chunked(b"")),
        turn(thief, work),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            raw.call(call)
        assert refused.value.code() in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.NOT_FOUND)
    federation.server("run", "stop", run_id)


async def turn(device: RawDevice, work: link_pb2.Work) -> object:
    request = link_pb2.TurnRequest(message_id=work.message_id, kind=link_pb2.TurnRequest.FETCH)
    return await device.link.Turn(request)


async def collected(device: RawDevice, work: link_pb2.Work) -> bytes:
    return b"".join([chunk async for chunk in device.fetch(work)])


@pytest.mark.slow
def test_a_revoked_device_is_cut_off_while_connected(federation: Federation, raw: Devices) -> None:
    (agent,) = enrolled(federation, ["revoked"]).values()
    device = raw_device(agent, devices.echo)
    running = raw.start(device)
    federation.server("devices", "revoke", agent.device_id)
    with pytest.raises(grpc.aio.AioRpcError) as cut:
        running.result(timeout=10)
    assert cut.value.code() == grpc.StatusCode.PERMISSION_DENIED
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        raw.start(device)
    assert refused.value.code() == grpc.StatusCode.PERMISSION_DENIED
    assert agent.device_id not in federation.online()
