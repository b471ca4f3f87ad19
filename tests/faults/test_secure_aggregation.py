"""Secure aggregation among real agents and a real hub: signed keys, masked rounds, a killed device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from federation import Federation
from gate import TASK, Gate

DEVICES = 4
CONFIG = {
    "rounds": {"count": 2, "deadline_s": 60.0},
    "model": {"standardise": False},
    "train": {"epochs": 1},
    "privacy": {"secure_aggregation": True},
}


@pytest.fixture
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    folder = tmp_path_factory.mktemp("federation")
    Gate.install(folder).open()
    settings = {"limits": {"offline_grace_s": 3.0}}
    with Federation(folder, DEVICES, TASK, settings, environment={"PYTHONPATH": str(folder)}) as made:
        made.start_agents()
        yield made


@pytest.mark.slow
def test_devices_add_up_under_masks_and_one_that_is_killed_while_training_is_taken_off(
    federation: Federation,
) -> None:
    run_id = federation.start_run(CONFIG)
    federation.wait_run(run_id)
    records = [record for number, record, _ in federation.rounds(run_id) if number]
    assert [record["clients"] for record in records] == [DEVICES] * 2, federation.story(run_id)
    assert all(record["privacy"]["secure_neighbours"] == DEVICES - 1 for record in records)
    assert all(not record["rejected"] for record in records)

    gate = Gate(federation.folder / "gate")
    gate.close()
    run_id = federation.start_run(CONFIG)
    gate.wait(DEVICES)
    process = federation.devices[3].process
    assert process is not None
    process.kill()
    gate.open()
    federation.wait_run(run_id)
    records = [record for number, record, _ in federation.rounds(run_id) if number]
    assert [record["clients"] for record in records] == [DEVICES - 1] * 2, federation.story(run_id)
    assert records[0]["privacy"]["secure_lost"] == 1


@pytest.mark.slow
def test_devices_share_out_the_noise_of_their_sum_by_secrets_of_their_own(federation: Federation) -> None:
    shared = {"mechanism": "distributed", "noise_multiplier": 1.0, "delta": 1e-3, "secure_corrupt": 0.0}
    asked = {**CONFIG, "clients": {"count": DEVICES}, "privacy": {**CONFIG["privacy"], **shared}}
    run_id = federation.start_run(asked)
    federation.wait_run(run_id)
    records = [record for number, record, _ in federation.rounds(run_id) if number]
    assert [record["clients"] for record in records] == [DEVICES] * 2, federation.story(run_id)
    assert all(record["privacy"]["noise"] == "secret" for record in records)
    assert all(record["privacy"]["secure_least"] == DEVICES for record in records)  # 20 % of 4 is none
    assert records[0]["privacy"]["epsilon"] < records[1]["privacy"]["epsilon"]
    assert all(record["train_loss"] is None for record in records)  # no noise would cover it
