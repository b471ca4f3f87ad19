"""How many clients are batched together: measured once, kept with the run."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest
import torch

from fedge.config import Train
from fedge.dataset import Examples
from fedge_simulations.engine.measured import PLAN, Plan, fastest
from fedge_simulations.engine.stack import Layout


class Costly:
    """A step takes as long as it is told to, and changes nothing."""

    def __init__(self, fixed_s: float, square_s: float) -> None:
        self.fixed_s, self.square_s = fixed_s, square_s

    def begin(self, flat, pull=None) -> None:
        pass

    def step(self, x, y, weight, keys):
        end = time.thread_time() + self.fixed_s + self.square_s * len(x) ** 2
        while time.thread_time() < end:
            pass
        return torch.zeros(len(x))

    def end(self) -> None:
        pass


@pytest.mark.parametrize(("fixed_s", "square_s", "wanted"), [(4e-4, 0.0, 12), (0.0, 4e-4, 1)])
def test_many_are_batched_where_a_step_costs_the_same_for_all_and_one_where_large_stacks_are_slow(
    fixed_s, square_s, wanted, digits_job
):
    data, job, _ = digits_job()
    some = replace(job, examples=Examples(data.x[:20], data.y[:20]))
    layout, settings = Layout.of(job.state), Train(batch_size=10)
    preprocess = torch.nn.Flatten()
    assert fastest(layout, settings, Costly(fixed_s, square_s), preprocess, some, most=12) == wanted


def test_what_was_measured_holds_from_the_next_round_on_in_a_resumed_run_too(tmp_path, digits_job):
    _, job, _ = digits_job()
    third = replace(job.instructions, round=3)
    Plan.of(tmp_path).keep(third, 8)
    again = Plan.of(tmp_path)
    assert [again.at_once(replace(third, round=n)) for n in (2, 3, 4, 9)] == [0, 0, 8, 8]
    assert again.at_once(third, ever=True) == 8
    assert again.at_once(replace(third, model="another", round=9)) == 0


@pytest.mark.parametrize("text", ["", "[]", '{"at_once": {"a": [0, 1]}}', '{"at_once": {"a": 5}}', "\xff"])
def test_a_plan_that_cannot_be_read_is_none(tmp_path, text):
    (tmp_path / PLAN).write_bytes(text.encode("latin-1"))
    assert Plan.of(tmp_path).found == {}
    assert json.loads(json.dumps(Plan.of(tmp_path).found)) == {}
