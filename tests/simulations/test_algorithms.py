"""Algorithms for clients that differ, in whole runs: against formulas of their own, and on every engine."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, RecordDict

from fedge import tensors
from fedge.learning import local
from fedge.learning.messages import from_record, to_record
from fedge.learning.state import arrays_of
from fedge_server.registry.database import Registry
from fedge_server.rounds.sampling import draw
from fedge_simulations.states import States
from fedge_simulations.world import prepare

ENGINES = ["vector", "sequential"]
WHOLE = {
    "epochs": 3,
    "batch_size": 1000,
    "learning_rate": 0.1,
    "momentum": 0.0,
}  # each step over all examples
PLAIN = {"name": "logistic", "standardise": False}


def gradient(w, b, x, y):
    z = x @ w.T + b
    p = np.exp(z - z.max(1, keepdims=True))
    error = (p / p.sum(1, keepdims=True) - np.eye(10)[y]) / len(x)
    return np.concatenate([(error.T @ x).ravel(), error.sum(0)])


def scaffold(config, rounds, cohort):
    """Algorithm 1 of Karimireddy et al. 2020 with option II, written out in float64."""
    world = prepare(config)
    shares = [world.dataset.examples.take(world.clients[i]) for i in range(len(world.clients))]
    network = world.task.preprocess(world.dataset.spec, None, "none")
    start = first(config)
    x, size = np.concatenate([value.ravel() for value in start.values()]).astype(np.float64), 640
    c, own = np.zeros_like(x), np.zeros((len(shares), len(x)))
    for number in range(1, rounds + 1):
        moved, changed = [], []
        chosen = draw(None, range(1, 6), cohort, seed=config.seed, number=number, purpose="train")
        for i in sorted(node - 1 for node in chosen):
            inputs = (
                network(torch.from_numpy(shares[i].x)).numpy().reshape(len(shares[i]), -1).astype(np.float64)
            )
            y = x.copy()
            for _ in range(3):
                g = gradient(y[:size].reshape(10, 64), y[size:], inputs, shares[i].y)
                y = y - 0.1 * (g - own[i] + c)
            new = own[i] - c + (x - y) / (3 * 0.1)
            moved.append(y - x)
            changed.append(new - own[i])
            own[i] = new
        x = x + np.mean(moved, 0)
        c = c + len(chosen) / len(shares) * np.mean(changed, 0)
    return x


def first(config):
    world = prepare(config)
    return arrays_of(local.first(world.task, "logistic", world.dataset.spec, config.seed))


@pytest.mark.quick_where(cohort=(3,))
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("cohort", [5, 3])
def test_scaffold_is_the_papers_algorithm(engine, cohort, small, learn, tmp_path):
    config = small(
        model=PLAIN,
        clients={"partition": "dirichlet:0.3"},
        rounds={"count": 4, "cohort": cohort},
        train=WHOLE,
        strategy={"name": "scaffold"},
        simulation={"engine": engine},
    )
    learned = learn(config, tmp_path)
    found = np.concatenate([v.ravel() for v in arrays_of(learned.model.network).values()])
    start = np.concatenate([v.ravel() for v in first(config).values()])
    expected = scaffold(config, 4, cohort)
    assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected - start)


@pytest.mark.slow
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_fednovas_partial_sums_are_its_full_messages(momentum, small, learn, tmp_path):
    """Clients of unequal size make unequally many steps; those with as many come as one."""
    config = small(
        model=PLAIN,
        clients={"partition": "dirichlet:0.3"},
        train={"momentum": momentum, "epochs": 2},
        strategy={"name": "fednova"},
        rounds={"count": 3},
    )
    asked = []

    def listening(honest):
        def call(message, context):
            reply = honest(message, context)
            asked.append(reply.content["metrics"].get("steps"))
            return reply

        return call

    summed = arrays_of(learn(config, tmp_path / "summed").model.network)
    single = arrays_of(learn(config, tmp_path / "single", around=listening).model.network)
    average = arrays_of(
        learn(small(**{**_sections(config), "strategy": {"name": "fedavg"}}), tmp_path / "a").model.network
    )
    assert len({steps for steps in asked if steps}) > 2
    for name, value in single.items():
        np.testing.assert_allclose(summed[name], value, rtol=0, atol=5e-5)
    assert max(np.abs(average[name] - value).max() for name, value in single.items()) > 1e-3


def _sections(config):
    values = config.to_mapping()
    return {name: values[name] for name in ("model", "clients", "train", "rounds")}


PERSONAL = {
    "fedper": ("mlp", {"layers": 1}, ["5.weight", "5.bias"]),
    "fedbn": (
        "mlp-bn",
        {},
        [f"{i}.{n}" for i in (2, 5) for n in ("weight", "bias", "running_mean", "running_var")],
    ),
}


@pytest.mark.quick_where(name=("fedper",))
@pytest.mark.parametrize("name", PERSONAL)
def test_what_stays_on_a_device_is_in_no_message(name, small, learn, tmp_path):
    model, options, own = PERSONAL[name]
    seen: list[RecordDict] = []

    def listening(honest):
        def call(message, context):
            seen.append(message.content)
            reply = honest(message, context)
            seen.append(reply.content)
            return reply

        return call

    config = small(
        model={"name": model},
        strategy={"name": name, **options},
        evaluate={"federated": True},
        rounds={"count": 2},
    )
    learned = learn(config, tmp_path, around=listening)
    names = {
        array
        for content in seen
        for record in content.values()
        if isinstance(record, ArrayRecord)
        for array in record
    }
    whole = arrays_of(learned.model.network)
    assert set(own) <= set(whole)
    assert names - {"count", "total", "squares"} == set(whole) - set(own)
    states = States(tmp_path / "clients")
    kept = [from_record(states.load(node)["own"]) for node in range(1, 6)]
    assert all(sorted(state) == sorted(own) for state in kept)
    assert not np.array_equal(kept[0][own[0]], kept[1][own[0]])
    assert [record.clients for record in learned.records] == [5, 5]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fedper", "ditto"])
def test_personal_models_answer_better_where_clients_have_few_classes(name, small, learn, tmp_path):
    def accuracy(strategy, folder, rounds=6):
        config = small(
            model={"name": "mlp"},
            clients={"partition": "shards:1"},
            strategy=strategy,
            evaluate={"federated": True},
            rounds={"count": rounds},
        )
        return learn(config, tmp_path / folder).records[-1].client_metrics["accuracy"]

    assert accuracy({"name": name}, name) > accuracy({"name": "fedavg"}, "fedavg") + 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scaffold", "fednova", "fedper", "fedbn", "ditto"])
def test_clients_that_are_batched_give_what_each_gives_alone(name, small, learn, tmp_path):
    model = {"fedper": "mlp", "fedbn": "mlp-bn"}.get(name, "logistic")
    found = []
    for engine in ENGINES:
        config = small(
            model={"name": model},
            clients={"partition": "dirichlet:1.0"},
            strategy={"name": name},
            evaluate={"federated": True},
            rounds={"count": 3, "cohort": 4},
            train={"momentum": 0.9},
            simulation={"engine": engine},
        )
        found.append(learn(config, tmp_path / engine))
    one, other = (arrays_of(learned.model.network) for learned in found)
    for key, value in one.items():
        assert value == pytest.approx(other[key], abs=1e-3)
    losses = [[record.client_metrics["loss"] for record in learned.records] for learned in found]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.slow
def test_scaffold_with_a_quorum_keeps_the_mean_of_all_control_variates(small, learn, tmp_path):
    """Those that are cut off have done nothing, and those that are lost are told: c stays the mean of c_i."""
    config = small(
        model=PLAIN,
        strategy={"name": "scaffold"},
        rounds={"count": 6, "quorum": 0.6},
        scenario={"speed_sigma": 1.0, "dropouts": 0.2},
    )
    learn(config, tmp_path)
    with Registry.open(tmp_path) as registry:
        last = registry.last_round("test")
    arrays, _ = tensors.parse(last.state)
    c = [arrays[f"control/{i}"] for i in range(2)]
    states = States(tmp_path / "clients")
    kept = [states.load(node) for node in range(1, 6)]
    assert any("control" in state for state in kept)
    total = [np.zeros_like(value) for value in c]
    for state in kept:
        for i, value in enumerate(from_record(state["control"]).values() if "control" in state else ()):
            total[i] += value / 5
    assert c[0] == pytest.approx(total[0], abs=1e-6)
    assert c[1] == pytest.approx(total[1], abs=1e-6)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda reply: reply.content["metrics"].update({"steps": 0}),
            "steps is 0; it must be a whole number",
        ),
        (lambda reply: reply.content["metrics"].update({"steps": 2.5}), "steps is 2.5"),
        (lambda reply: reply.content["metrics"].pop("steps"), "metrics"),
    ],
)
def test_a_client_that_misstates_its_steps_is_rejected(change, reason, small, learn, tmp_path):
    def tamper(_, reply):
        change(reply)
        return reply

    config = small(strategy={"name": "fednova"}, rounds={"count": 1})
    (record,) = learn(config, tmp_path, tamper={2: tamper}).records
    assert record.clients == 4
    assert [(r.client, reason in r.reason) for r in record.rejected] == [(2, True)]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (None, "records ['arrays', 'metrics'] instead of ['arrays', 'control', 'metrics']"),
        (np.nan, "holds NaN"),
        ((1,), "is float32 (1,) instead of"),
    ],
)
def test_a_control_variate_is_held_against_the_models_parameters(values, reason, small, learn, tmp_path):
    def tamper(_, reply):
        before = from_record(reply.content["control"])
        if values is None:
            del reply.content["control"]
        else:
            shaped = values if isinstance(values, tuple) else None
            reply.content["control"] = to_record(
                {
                    name: np.zeros(shaped, np.float32) if shaped else np.full_like(value, values)
                    for name, value in before.items()
                }
            )
        return reply

    config = small(strategy={"name": "scaffold"}, rounds={"count": 2})
    for record in learn(config, tmp_path, tamper={2: tamper}).records:
        assert record.clients == 4
        assert [(r.client, reason in r.reason) for r in record.rejected] == [(2, True)]


@pytest.mark.slow
def test_clients_of_two_architectures_teach_a_third(small, learn, tmp_path):
    seen = []

    def listening(honest):
        def call(message, context):
            reply = honest(message, context)
            if message.metadata.message_type == "train":
                config, arrays = message.content["config"], reply.content["arrays"]
                seen.append((context.node_id, config["model"], sum(a.numpy().size for a in arrays.values())))
            return reply

        return call

    config = small(
        model={"name": "mlp-bn"},
        strategy={"name": "feddf", "models": "mlp,logistic"},
        rounds={"count": 6},
        evaluate={"federated": True},
    )
    records = learn(config, tmp_path, around=listening).records
    assert {entry[:2] for entry in seen} == {
        (1, "logistic"),
        (3, "logistic"),
        (5, "logistic"),
        (2, "mlp"),
        (4, "mlp"),
    }
    assert {(model, size) for _, model, size in seen} == {("logistic", 650), ("mlp", 55210)}
    assert all(record.clients == 5 for record in records)
    assert records[-1].metrics["accuracy"] > 0.8  # of a model that no client has had
    assert records[-1].client_metrics["accuracy"] > 0.8


def test_a_client_that_answers_with_anothers_architecture_is_rejected(small, learn, tmp_path):
    def tamper(_, reply):
        reply.content["arrays"] = to_record({"w": np.zeros(3, np.float32)})
        return reply

    config = small(strategy={"name": "feddf", "models": "mlp,logistic", "epochs": 1}, rounds={"count": 1})
    (record,) = learn(config, tmp_path, tamper={2: tamper}).records
    assert record.clients == 4
    assert [(r.client, r.reason.startswith("array names differ")) for r in record.rejected] == [(2, True)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fedper", "ditto"])
@pytest.mark.parametrize(
    "privacy", [{"secure_aggregation": True}, {"mechanism": "central"}, {"mechanism": "local"}]
)
def test_what_stays_on_devices_goes_with_masks_and_noise(privacy, name, small, learn, tmp_path):
    config = small(
        model={"name": "mlp", "standardise": False},
        strategy={"name": name},
        privacy={**privacy, "accountant": "rdp"},
        rounds={"count": 2},
    )
    learned = learn(config, tmp_path)
    assert [record.clients for record in learned.records] == [5, 5]
    states = States(tmp_path / "clients")
    kept = from_record(states.load(1)["own" if name == "fedper" else "personal"])
    whole = arrays_of(learned.model.network)
    assert sorted(kept) == (["5.bias", "5.weight"] if name == "fedper" else sorted(whole))


@pytest.mark.slow
def test_fedbn_answers_better_where_each_clients_sensor_measures_otherwise(small, learn, tmp_path):
    """What it is for: the same classes, but each client's values are turned over, scaled and moved."""
    digits = prepare(small()).dataset.examples
    rng = np.random.default_rng(0)
    client = rng.integers(0, 4, len(digits.y))
    x = (
        digits.x * np.array([1, -3, 0.2, -8])[client, None, None]
        + np.array([0, 60, 7, -40])[client, None, None]
    )
    np.savez(tmp_path / "own.npz", x=x.astype(np.float32), y=digits.y.astype(str), client=client)

    def accuracy(name):
        config = small(
            data=str(tmp_path / "own.npz"),
            model={"name": "mlp-bn", "standardise": False},
            clients={"partition": "natural", "count": None},
            strategy={"name": name},
            evaluate={"federated": True, "client_holdout": 0.3},
            rounds={"count": 12},
        )
        return learn(config, tmp_path / name).records[-1].client_metrics["accuracy"]

    assert accuracy("fedbn") > accuracy("fedavg") + 0.02
