"""A network that breaks between an agent and its hub: the run goes on, and the device comes back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from federation import Agent, Federation, wait_for
from gate import TASK, Gate
from proxy import NONE, FaultProxy, Faults

DEVICES = 2
GRACE_S = 3.0  # of a device that is away with an open message
DEADLINE_S = 30.0  # of a round; loading torch is part of the first


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    folder = tmp_path_factory.mktemp("federation")
    gate = Gate.install(folder)
    gate.open()
    settings = {"limits": {"offline_grace_s": GRACE_S}}
    quick = {"link": {"backoff_max_s": 1}}
    environment = {"PYTHONPATH": str(folder)}
    with Federation(folder, DEVICES, TASK, settings, quick, environment=environment) as made:
        yield made


@pytest.fixture(scope="module")
def through(federation: Federation) -> Iterator[FaultProxy]:
    """The way of device 0 to the hub; device 1 has a good one."""
    with FaultProxy("127.0.0.1", federation.link_port) as proxy:
        federation.devices[0].reach_link_at(proxy.address)
        federation.start_agents()
        yield proxy
        for device in federation.devices:
            if device.process is not None:
                device.process.end()


@pytest.fixture
def gate(federation: Federation) -> Iterator[Gate]:
    gate = Gate(federation.folder / "gate")
    yield gate
    gate.open()


@pytest.fixture
def proxy(through: FaultProxy, federation: Federation) -> Iterator[FaultProxy]:
    through.faults = NONE
    federation.wait_online(*federation.devices)
    yield through
    through.faults = NONE


@pytest.fixture
def broken(federation: Federation) -> Agent:
    return federation.devices[0]


def start(federation: Federation, *, model: str = "logistic", rounds: int = 2, **more: Any) -> str:
    return federation.start_run(
        {"rounds": {"count": rounds, **more}, "model": {"name": model, "standardise": False}}
    )


def clients(federation: Federation, run_id: str) -> list[int]:
    return [record["clients"] for number, record, _ in federation.rounds(run_id) if number]


@pytest.mark.slow
def test_a_reset_while_idle_brings_the_device_back(
    federation: Federation, proxy: FaultProxy, broken: Agent
) -> None:
    before = proxy.accepted
    proxy.reset_all()
    wait_for(lambda: proxy.accepted > before, "the device connects again")
    federation.wait_online(broken)
    run_id = start(federation)
    federation.wait_run(run_id)
    assert clients(federation, run_id) == [DEVICES] * 2


@pytest.mark.slow
def test_a_reset_while_training_loses_no_update(
    federation: Federation, proxy: FaultProxy, gate: Gate, broken: Agent
) -> None:
    gate.close()
    run_id = start(federation)
    gate.wait(DEVICES)
    before = proxy.accepted
    proxy.reset_all()
    wait_for(lambda: proxy.accepted > before, "the device connects again")
    gate.open()
    federation.wait_run(run_id)
    assert clients(federation, run_id) == [DEVICES] * 2


@pytest.mark.slow
def test_resets_in_the_middle_of_a_model_resume_where_they_stopped(
    federation: Federation, proxy: FaultProxy, broken: Agent
) -> None:
    # A model of 4.3 MB each way, over connections that carry 1.5 MB each.
    before = proxy.accepted
    proxy.faults = Faults(reset_after=1_500_000)
    run_id = start(federation, model="wide", rounds=1)
    federation.wait_run(run_id, timeout_s=240)
    assert clients(federation, run_id) == [DEVICES]
    assert proxy.accepted - before >= 4


@pytest.mark.slow
def test_a_slow_network_is_only_slow(federation: Federation, proxy: FaultProxy) -> None:
    proxy.faults = Faults(delay_s=0.1, bytes_per_s=400_000)
    run_id = start(federation)
    federation.wait_run(run_id)
    assert clients(federation, run_id) == [DEVICES] * 2


@pytest.mark.slow
def test_a_flipped_bit_ends_the_connection_and_not_the_update(
    federation: Federation, proxy: FaultProxy, broken: Agent
) -> None:
    proxy.faults = Faults(flip_up=30_000, flip_down=30_000)  # of every connection
    run_id = start(federation, model="wide", rounds=1)
    wait_for(lambda: proxy.accepted >= 2, "the device connects again")
    wait_for(lambda: federation.messages(run_id, "open") == 1, "the other device has answered")
    proxy.faults = NONE
    proxy.reset_all()
    federation.wait_run(run_id)
    assert clients(federation, run_id) == [DEVICES]


@pytest.mark.slow
def test_a_black_hole_costs_its_device_and_not_the_round(
    federation: Federation, proxy: FaultProxy, gate: Gate, broken: Agent
) -> None:
    gate.close()
    run_id = start(federation, rounds=1, deadline_s=DEADLINE_S)
    gate.wait(DEVICES)
    proxy.faults = Faults(swallow=True)
    gate.open()
    federation.wait_run(run_id, timeout_s=240)
    assert clients(federation, run_id) == [DEVICES - 1]
    proxy.faults = NONE
    proxy.reset_all()
    federation.wait_online(broken)
    run_id = start(federation, rounds=1)
    federation.wait_run(run_id)
    assert clients(federation, run_id) == [DEVICES]
