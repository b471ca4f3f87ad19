"""Clients on a GPU where there is one, and what happens where there is none or it does not do."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedge.config import Simulation
from fedge.errors import ConfigError
from fedge.learning.state import arrays_of
from fedge_simulations.engine import Engine, devices_of
from fedge_simulations.engine.stack import CPU

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here")


def test_the_cpu_is_the_last_resort_and_a_gpu_is_tried_first(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [device.type for device in devices_of(Simulation())] == ["cuda", "cpu"]
    assert devices_of(Simulation(device="cpu")) == (CPU,)


def test_a_gpu_that_is_asked_for_and_not_there_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices_of(Simulation()) == (CPU,)
    with pytest.raises(ConfigError, match=r"simulation\.device = 'cuda': torch finds no GPU"):
        devices_of(Simulation(device="cuda"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it would work")
def test_where_a_models_steps_on_the_gpu_fail_its_clients_are_trained_on_the_cpu(digits_job, monkeypatch):
    data, job, clients = digits_job()
    plain = Engine(Simulation(workers=1), data).sum(job, clients)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    said = []
    engine = Engine(Simulation(), data, say=said.append)
    found = engine.sum(job, clients)
    assert len(said) == 1
    assert "not on cuda" in said[0]
    assert said[0].endswith("trained on the CPU")
    for name, value in plain.mean.items():
        assert np.array_equal(found.mean[name], value)


@needs_gpu
@pytest.mark.parametrize("model", ["logistic", "mlp", "mlp-bn"])
def test_a_gpu_gives_what_the_cpu_gives(model, small, learn, tmp_path):
    runs = [
        learn(small(model={"name": model}, simulation={"device": device}), tmp_path / device)
        for device in ("cpu", "cuda")
    ]
    one, other = (arrays_of(run.model.network) for run in runs)
    for name, value in one.items():
        assert np.allclose(other[name], value, atol=1e-3), name
