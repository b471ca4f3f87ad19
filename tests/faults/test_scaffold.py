"""SCAFFOLD among real agents, one of which is killed: the server's control variate stays their mean."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from federation import Federation
from gate import TASK, Gate

from fedge import tensors
from fedge.learning.messages import from_record
from fedge_client.agent import state as agent_state
from fedge_client.keeping import BEFORE, KEPT
from fedge_server.registry.database import Registry

DEVICES = 3


@pytest.fixture
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    folder = tmp_path_factory.mktemp("federation")
    Gate.install(folder)
    settings = {"limits": {"offline_grace_s": 3.0}}
    with Federation(folder, DEVICES, TASK, settings, environment={"PYTHONPATH": str(folder)}) as made:
        made.start_agents()
        yield made


@pytest.mark.slow
def test_a_device_that_is_killed_while_training_leaves_the_mean_as_it_is(federation: Federation) -> None:
    gate = Gate(federation.folder / "gate")
    run_id = federation.start_run(
        {
            "clients": {"count": DEVICES},
            "rounds": {"count": 4},
            "model": {"standardise": False},
            "train": {"epochs": 1, "momentum": 0.0},
            "strategy": {"name": "scaffold"},
        }
    )
    gate.pass_one_round(DEVICES)
    gate.wait(DEVICES)
    victim = federation.devices[2]
    assert victim.process is not None
    victim.process.kill()  # in round 2
    gate.open()
    federation.start_agent(victim)
    federation.wait_run(run_id)
    records = [record for number, record, _ in federation.rounds(run_id) if number]
    assert len(records) == 4, federation.story(run_id)
    assert all(record["clients"] >= 2 for record in records), federation.story(run_id)

    with Registry.open(federation.home) as registry:
        last = registry.last_round(run_id)
    assert last is not None
    arrays, _ = tensors.parse(last.state)
    void = {int(node): int(number) for node, number in arrays["void"]}
    total = [np.zeros_like(arrays[f"control/{i}"]) for i in range(2)]
    for device in federation.devices:
        (folder,) = (device.home / "state").iterdir()
        kept = agent_state.before(folder, "no message")
        counted = int(kept[KEPT]["round"]) < void.get(device.node_id, 10**6)
        for i, value in enumerate(from_record(kept["control" if counted else BEFORE]).values()):
            total[i] += value / DEVICES
    assert np.abs(total[0]).max() > 0.001
    for i, value in enumerate(total):
        np.testing.assert_allclose(arrays[f"control/{i}"], value, rtol=0, atol=1e-6)
