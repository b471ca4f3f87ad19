"""kill -9 of each process at each stage of a round: what was committed stays, and nothing counts twice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from federation import Federation, cpu_s, frozen, is_alive, kill, wait_for
from gate import TASK, Gate

ROUNDS = 3
DEVICES = 2
VICTIMS = ("hub", "worker", "agent", "training process")
STAGES = ("before delivery", "while training", "before submission", "before commit")
CASES = [  # each victim and each stage twice; `make soak` runs the others
    pytest.param(stage, victim, marks=[pytest.mark.soak] if (i + j) % 2 else [])
    for i, stage in enumerate(STAGES)
    for j, victim in enumerate(VICTIMS)
]


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    folder = tmp_path_factory.mktemp("federation")
    Gate.install(folder)
    with Federation(folder, DEVICES, TASK, environment={"PYTHONPATH": str(folder)}) as made:
        made.start_agents()
        yield made


@pytest.fixture
def gate(federation: Federation) -> Iterator[Gate]:
    gate = Gate(federation.folder / "gate")
    gate.close()
    yield gate
    gate.open()  # whatever a failed test left waiting


def start(federation: Federation) -> str:
    """A run whose first message is the training of round 1."""
    return federation.start_run(
        {
            "rounds": {"count": ROUNDS},
            "model": {"standardise": False},
            "train": {"epochs": 1},
        }
    )


def worker_of(federation: Federation, run_id: str) -> int:
    return wait_for(lambda: federation.worker(run_id), "the run has a worker")


@contextmanager
def before_delivery(federation: Federation, gate: Gate, run_id: str) -> Iterator[None]:
    """Round 1 is committed, round 2 is queued, and no device has heard of it."""
    gate.wait(DEVICES)
    agents = [device.pid for device in federation.devices]
    with frozen(worker_of(federation, run_id)):
        gate.pass_one_round(DEVICES)
        wait_for(lambda: federation.messages(run_id, "answered") == DEVICES, "round 1 is answered")
        stopped = frozen(*agents)
        stopped.__enter__()
    try:
        wait_for(lambda: len(federation.rounds(run_id)) == 2, "round 1 is committed")
        wait_for(lambda: federation.messages(run_id, "open") == DEVICES, "round 2 is queued")
        gate.open()
        yield
    finally:
        stopped.__exit__(None, None, None)


@contextmanager
def while_training(federation: Federation, gate: Gate, run_id: str) -> Iterator[None]:
    """All devices are in the training of round 2."""
    gate.pass_one_round(DEVICES)
    wait_for(lambda: len(federation.rounds(run_id)) == 2, "round 1 is committed")
    gate.wait(DEVICES)
    yield


@contextmanager
def before_submission(federation: Federation, gate: Gate, run_id: str) -> Iterator[None]:
    """All devices have trained round 2, and the hub does not hear them."""
    with while_training(federation, gate, run_id):
        assert federation.hub is not None
        hub = federation.hub.pid
        children = [device.child() for device in federation.devices]
        with frozen(hub):
            gate.open()
            for child in children:
                assert child is not None
                wait_until_idle(child)
            yield


@contextmanager
def before_commit(federation: Federation, gate: Gate, run_id: str) -> Iterator[None]:
    """The hub has all answers of round 2, and the worker does not take them."""
    with while_training(federation, gate, run_id), frozen(worker_of(federation, run_id)):
        gate.open()
        wait_for(lambda: federation.messages(run_id, "answered") == DEVICES, "round 2 is answered")
        yield


REACH = dict(zip(STAGES, (before_delivery, while_training, before_submission, before_commit), strict=True))


def wait_until_idle(pid: int) -> None:
    """Until a process uses no CPU between two looks: it has done its work, or is gone."""
    last = -1.0

    def still() -> bool:
        nonlocal last
        before, last = last, cpu_s(pid) if is_alive(pid) else last
        return last == before

    wait_for(still, "the training process is idle")


def kill_victim(federation: Federation, victim: str, run_id: str) -> None:
    """SIGKILL; what nobody else restarts is started again at once."""
    device = federation.devices[0]
    if victim == "hub":
        assert federation.hub is not None
        federation.hub.kill()
        federation.start_hub()
    elif victim == "worker":
        kill(worker_of(federation, run_id))
    elif victim == "agent":
        child = device.child()
        assert device.process is not None
        device.process.kill()
        wait_for(lambda: child is None or not is_alive(child), "the training process ends with its agent")
        federation.start_agent(device, wait=False)
    else:
        child = device.child()
        assert child is not None
        kill(child)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "victim"), CASES)
def test_the_run_ends_with_all_rounds_and_no_update_counted_twice(
    federation: Federation, gate: Gate, victim: str, stage: str
) -> None:
    run_id = start(federation)
    with REACH[stage](federation, gate, run_id):
        committed = federation.rounds(run_id)
        kill_victim(federation, victim, run_id)
    gate.open()

    federation.wait_run(run_id)
    rounds = federation.rounds(run_id)
    assert [number for number, _, _ in rounds] == list(range(ROUNDS + 1))
    assert rounds[: len(committed)] == committed
    for number, record, _ in rounds[1:]:
        # What follows the fault asks whoever is back by then.
        assert record["asked"] == DEVICES or number > 2
        failed = 1 if victim == "training process" and number == 2 else 0  # that device's failure
        assert record["asked"] - failed <= record["clients"] <= record["asked"] <= DEVICES
        assert record["counted"]
    federation.wait_online(*federation.devices)
