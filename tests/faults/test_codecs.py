"""Codecs among real agents and a real hub: a worker that is killed in a round changes nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from federation import Federation, kill
from gate import TASK, Gate
from test_kill import DEVICES, before_commit, while_training, worker_of

CONFIG = {
    "rounds": {"count": 4},
    "model": {"standardise": False},
    "train": {"epochs": 1},
    "strategy": {"name": "fedavg", "accumulate": "float64"},  # whoever answers first
    "communication": {"codec": ["topk:0.05", "int8"], "downlink": ["topk:0.2", "int8"]},
}


@pytest.fixture
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    folder = tmp_path_factory.mktemp("federation")
    Gate.install(folder).open()
    with Federation(folder, DEVICES, TASK, environment={"PYTHONPATH": str(folder)}) as made:
        made.start_agents()
        yield made


@pytest.mark.slow
def test_a_round_that_a_killed_worker_asks_for_again_gives_the_same_updates(federation: Federation) -> None:
    gate = Gate(federation.folder / "gate")
    whole = federation.start_run(CONFIG)
    federation.wait_run(whole)
    rounds = federation.rounds(whole)
    for _, record, _ in rounds[1:]:
        assert (record["clients"], record["rejected"]) == (DEVICES, []), federation.story(whole)
    first, *later = (record["bytes_down"] for _, record, _ in rounds[1:])
    assert max(later) < first / 2

    for stage in (while_training, before_commit):
        gate.close()
        run_id = federation.start_run(CONFIG)
        with stage(federation, gate, run_id):
            kill(worker_of(federation, run_id))
        gate.open()
        federation.wait_run(run_id)
        again = federation.rounds(run_id)
        assert [record["updates"] for _, record, _ in again] == [record["updates"] for _, record, _ in rounds]
        assert all(not record["rejected"] for _, record, _ in again)
        assert again[-1][2] == rounds[-1][2]  # the model's digest
