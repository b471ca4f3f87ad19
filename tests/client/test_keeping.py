"""What a client keeps for its strategy: used where it must be, and never sent."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedge.config import Train
from fedge.dataset import Examples
from fedge.errors import FormatError
from fedge.learning import local
from fedge.learning.local import Job
from fedge.learning.messages import Instructions, from_record, to_record
from fedge.learning.state import NamedArrays, arrays_of
from fedge.learning.terms import Terms
from fedge.spec import Spec
from fedge.task import resolve
from fedge_client import app

SPEC = Spec("features", (3,), "float32", ("a", "b"), ())
TASK = resolve("tables")
RNG = np.random.default_rng(0)
DATA = Examples(RNG.normal(size=(12, 3)).astype(np.float32), RNG.integers(0, 2, 12))
CLIENT = app.build(lambda context, instructions: (TASK, DATA))
STATE = arrays_of(local.first(TASK, "logistic", SPEC, 5))
WEIGHT, BIAS = STATE


@pytest.fixture(autouse=True)
def identity() -> None:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 9, 1


@pytest.fixture
def context() -> Context:
    return Context(1, 7, {}, RecordDict(), {})


def told(terms: Terms, number: int = 1, void: int | None = None, **train: Any) -> Instructions:
    settings = Train(**{"epochs": 2, "batch_size": 4, "learning_rate": 0.1, "momentum": 0.0, **train})
    return Instructions(
        task="tables", spec=SPEC, model="logistic", noise_filter="none", moments=None, train=settings, seed=5,
        update="weights", round=number, terms=terms, void=void,
    )  # fmt: skip


def ask(
    context: Context,
    instructions: Instructions,
    state: NamedArrays,
    control: NamedArrays | None = None,
    kind: str = "train",
) -> RecordDict:
    content = RecordDict({"arrays": to_record(state), "config": instructions.to_config()})
    if control is not None:
        content["control"] = to_record(control)
    return CLIENT(Message(content, 7, kind), context).content


def trained(instructions: Instructions, state: NamedArrays, **changes: Any) -> NamedArrays:
    seed = app.client_seed(instructions.seed, instructions.round, 7)
    plain = replace(instructions, terms=Terms(), void=None)
    return local.fit(replace(Job(TASK, plain, state, DATA, seed), **changes)).arrays


def test_steps_are_sent_where_they_are_asked_for(context: Context) -> None:
    assert "steps" not in ask(context, told(Terms()), STATE)["metrics"]
    assert ask(context, told(Terms(steps=True)), STATE)["metrics"]["steps"] == 6
    assert len(context.state) == 0


def test_what_is_a_clients_own_never_travels_and_is_used_again(context: Context) -> None:
    terms, shared = Terms(own=(BIAS,)), {WEIGHT: STATE[WEIGHT]}
    sent = ask(context, told(terms), shared)
    assert list(sent["arrays"]) == [WEIGHT]
    first = trained(told(terms), STATE)  # its own part is at first that of the run's first model
    assert sent["arrays"][WEIGHT].numpy() == pytest.approx(first[WEIGHT])
    again = ask(context, told(terms, 2), shared)
    second = trained(told(terms, 2), {WEIGHT: STATE[WEIGHT], BIAS: first[BIAS]})
    assert again["arrays"][WEIGHT].numpy() == pytest.approx(second[WEIGHT])
    kept = from_record(context.state["own"])
    assert list(kept) == [BIAS]
    assert kept[BIAS] == pytest.approx(second[BIAS])


def test_it_evaluates_with_its_own_part(context: Context) -> None:
    terms, shared = Terms(own=(BIAS,)), {WEIGHT: np.zeros_like(STATE[WEIGHT])}
    context.state["own"] = to_record({BIAS: np.array([50.0, -50.0], np.float32)})
    found = ask(context, told(terms), shared, kind="evaluate")["metrics"]
    assert found["accuracy"] == pytest.approx(float((DATA.y == 0).mean()))


def test_a_message_that_does_not_make_up_the_model_is_refused(context: Context) -> None:
    with pytest.raises(FormatError, match="are not the model's"):
        ask(context, told(Terms(own=("elsewhere",))), STATE)
    with pytest.raises(FormatError, match="are not the model's"):
        ask(context, told(Terms(own=(BIAS,))), {"other": STATE[WEIGHT]})


def test_a_personal_model_is_pulled_towards_the_global_one_and_stays(context: Context) -> None:
    instructions = told(Terms(pull=0.5))
    sent = ask(context, instructions, STATE)
    assert sorted(sent) == ["arrays", "metrics"]
    assert sent["arrays"][WEIGHT].numpy() == pytest.approx(trained(instructions, STATE)[WEIGHT])
    first = trained(replace(instructions, proximal_mu=0.5), STATE, anchor=STATE)
    assert from_record(context.state["personal"])[WEIGHT] == pytest.approx(first[WEIGHT])
    moved = {name: value + 1 for name, value in STATE.items()}
    later = told(Terms(pull=0.5), 2)
    ask(context, later, moved)
    second = trained(replace(later, proximal_mu=0.5), first, anchor=moved)
    assert from_record(context.state["personal"])[WEIGHT] == pytest.approx(second[WEIGHT])
    # It answers with the personal model, whatever the global one says.
    evaluated = ask(context, later, moved, kind="evaluate")["metrics"]
    model = local.blank(TASK, "logistic", SPEC)
    model.load_state_dict({name: torch.from_numpy(value) for name, value in second.items()})
    logits = local.logits(model, torch.from_numpy(DATA.x))
    assert evaluated["accuracy"] == pytest.approx(float((logits.argmax(1).numpy() == DATA.y).mean()))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_scaffolds_client_is_option_two_as_written_in_the_paper(context: Context, momentum: float) -> None:
    """Full batches of a linear model, every step written out in float64."""
    settings = {"batch_size": 20, "epochs": 3, "momentum": momentum}
    c = {name: np.full_like(value, 0.05) for name, value in STATE.items()}
    c_i = {name: np.zeros_like(value) for name, value in STATE.items()}
    state = STATE
    for number in (1, 2):
        sent = ask(context, told(Terms(control=True), number, **settings), state, c)
        y, gradients = _steps(state, {n: c[n] - c_i[n] for n in c}, momentum)
        for name in STATE:
            # c_i+ is the mean of the gradients, weighted as momentum has added them up.
            way = [sum(momentum**i for i in range(3 - j)) for j in range(3)]
            mean = sum(a * g[name] for a, g in zip(way, gradients, strict=True)) / sum(way)
            assert sent["arrays"][name].numpy() == pytest.approx(y[name], abs=1e-6)
            assert sent["control"][name].numpy() == pytest.approx(mean - c_i[name], abs=1e-5)
            assert from_record(context.state["control"])[name] == pytest.approx(mean, abs=1e-5)
            c_i[name] = mean
        state = {name: value + np.float32(0.1) for name, value in STATE.items()}


def _steps(
    state: NamedArrays, shift: NamedArrays, momentum: float
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    w, b = (state[name].astype(np.float64) for name in (WEIGHT, BIAS))
    v, gradients, x = {WEIGHT: 0.0, BIAS: 0.0}, [], DATA.x.astype(np.float64)
    for _ in range(3):
        z = x @ w.T + b
        p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
        error = (p - np.eye(2)[DATA.y]) / len(x)
        g = {WEIGHT: error.T @ x, BIAS: error.sum(0)}
        gradients.append(g)
        v = {name: momentum * v[name] + g[name] + shift[name] for name in g}
        w, b = w - 0.1 * v[WEIGHT], b - 0.1 * v[BIAS]
    return {WEIGHT: w, BIAS: b}, gradients


def _kept(context: Context) -> float:
    return float(from_record(context.state["control"])[BIAS][0])


def test_a_change_that_was_not_counted_does_not_stay(context: Context) -> None:
    c = {name: np.zeros_like(value) for name, value in STATE.items()}
    terms = Terms(control=True)
    ask(context, told(terms, 1), STATE, c)
    counted, first = RecordDict(dict(context.state)), _kept(context)
    ask(context, told(terms, 2), STATE, c)  # its answer is lost
    lost = RecordDict(dict(context.state))
    assert _kept(context) != first
    ask(context, told(terms, 3, void=2), STATE, c)
    after = _kept(context)
    context.state = RecordDict(dict(counted))
    ask(context, told(terms, 3), STATE, c)
    assert _kept(context) == after  # as if round 2 had never been
    # Lost again, and told so: the server's last count is still that of round 1.
    context.state = RecordDict(dict(lost))
    ask(context, told(terms, 3, void=2), STATE, c)
    ask(context, told(terms, 4, void=2), STATE, c)
    twice = _kept(context)
    context.state = RecordDict(dict(counted))
    ask(context, told(terms, 4), STATE, c)
    assert _kept(context) == twice


def test_a_round_that_is_asked_again_begins_with_what_was_there_before(context: Context) -> None:
    c = {name: np.zeros_like(value) for name, value in STATE.items()}
    for number in (1, 2):
        sent = ask(context, told(Terms(control=True), number), STATE, c)
    again = ask(context, told(Terms(control=True), 2), STATE, c)  # the server was killed before it counted
    assert again["control"][BIAS].numpy().tolist() == sent["control"][BIAS].numpy().tolist()


def test_without_the_servers_control_variate_nothing_is_trained(context: Context) -> None:
    with pytest.raises(FormatError, match="no arrays named 'control'"):
        ask(context, told(Terms(control=True)), STATE)
