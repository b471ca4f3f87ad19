"""Frozen parts of a model: the same to the bit after training, in every world, and never sent back."""

from __future__ import annotations

import numpy as np
import pytest

from fedge.config import Config
from fedge.errors import ConfigError
from fedge.learning import local
from fedge.learning.freezing import entries
from fedge.learning.state import arrays_of
from fedge_server.privacy.rules import check
from fedge_server.strategies import NAMES
from fedge_simulations.world import prepare

OPTIONS = {
    "fedprox": {"proximal_mu": 0.1},
    "fedsgd": {"momentum": 0.9},
    "krum": {"num_malicious_nodes": 1, "mixing": 0.2},
    "multikrum": {"num_malicious_nodes": 1, "num_nodes_to_select": 2},
    "bulyan": {"num_malicious_nodes": 0},
    "ditto": {"pull": 0.5},
    "fedper": {"layers": 1},
}


def split(config: Config, learned) -> tuple[list[str], list[str]]:
    """Entries that are as at first, and the others."""
    world = prepare(config)
    first = arrays_of(local.first(world.task, config.model.name, world.dataset.spec, config.seed))
    last = arrays_of(learned.model.network)
    same = [name for name in first if first[name].tobytes() == last[name].tobytes()]
    return same, [name for name in first if name not in same]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["vector", "sequential"])
@pytest.mark.parametrize("name", sorted(set(NAMES) - {"feddf"}))
def test_a_frozen_layer_is_the_same_to_the_bit_after_training(name, engine, small, learn, tmp_path):
    model, frozen = ("mlp-bn", ["1.*"]) if name == "fedbn" else ("mlp", ["1.*"])
    config = small(
        model={"name": model},
        train={"freeze": frozen},
        strategy={"name": name, **OPTIONS.get(name, {})},
        rounds={"count": 2},
        simulation={"engine": engine},
    )
    same, moved = split(config, learn(config, tmp_path))
    assert {"1.weight", "1.bias"} <= set(same)
    kept = {"fedper", "fedbn"}  # what stays on devices is on the server as at first too
    assert set(same) == {"1.weight", "1.bias"} or name in kept
    assert moved


@pytest.mark.slow
@pytest.mark.parametrize("freeze", [["1.*"], ["3.*"], ["5.*"], ["1.*", "3.*"], ["*.bias"]])
@pytest.mark.parametrize("train", [{}, {"momentum": 0.0}, {"optimizer": "adam", "learning_rate": 0.001}])
def test_engines_agree_whatever_is_frozen(freeze, train, small, learn, tmp_path):
    found = []
    for engine in ("vector", "sequential"):
        config = small(
            model={"name": "mlp"},
            train={"freeze": freeze, **train},
            rounds={"count": 2},
            simulation={"engine": engine},
        )
        learned = learn(config, tmp_path / engine)
        assert split(config, learned)[0] == list(entries(learned.model.network, freeze))
        found.append(arrays_of(learned.model.network))
    for name, value in found[0].items():
        # Not entry by entry: where rounding turns a unit off (by the processor), its row differs.
        assert np.linalg.norm(value - found[1][name]) <= 1e-3 * np.linalg.norm(found[1][name])


@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 150)
    x = rng.integers(0, 120, (150, 8, 8), dtype=np.uint8)
    x[np.arange(150), y, y] += 120
    np.savez(tmp_path / "pictures.npz", x=x, y=y)
    return str(tmp_path / "pictures.npz")


@pytest.mark.quick_where(model=("cnn-bn",), momentum=(0.9,))
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(
    ("model", "freeze", "frozen"),
    [
        ("cnn", ["0.*", "3.*"], ["0.weight", "0.bias", "3.weight", "3.bias"]),
        ("cnn", ["7.*"], ["7.weight", "7.bias"]),
        ("cnn-bn", ["1.*"], ["1.weight", "1.bias", "1.running_mean", "1.running_var"]),
    ],
)
def test_convolutions_and_batch_normalisation_are_frozen_alike(
    model, freeze, frozen, momentum, pictures, small, learn, tmp_path
):
    found = []
    for engine in ("vector", "sequential"):
        config = small(
            task="images", data=pictures, clients={"count": 3}, model={"name": model},
            train={"freeze": freeze, "momentum": momentum}, rounds={"count": 2},
            simulation={"engine": engine},
        )  # fmt: skip
        learned = learn(config, tmp_path / engine)
        assert split(config, learned)[0] == frozen
        found.append(arrays_of(learned.model.network))
    for name, value in found[0].items():
        np.testing.assert_allclose(value, found[1][name], atol=1e-4)


@pytest.mark.slow
def test_frozen_parts_travel_down_and_not_up(small, learn, tmp_path):
    seen = []

    def around(honest):
        def call(message, context):
            reply = honest(message, context)
            if message.metadata.message_type == "train":
                sent = {name: list(record) for name, record in message.content.array_records.items()}
                seen.append((sent, list(reply.content.array_records["arrays"])))
            return reply

        return call

    config = small(model={"name": "mlp"}, train={"freeze": ["1.*", "3.*"]}, rounds={"count": 1})
    learned = learn(config, tmp_path / "frozen", around=around)
    down, up = seen[0]
    assert down == {
        "arrays": ["5.weight", "5.bias"],
        "frozen": ["1.weight", "1.bias", "3.weight", "3.bias"],
    }
    assert up == ["5.weight", "5.bias"]
    whole = learn(small(model={"name": "mlp"}, rounds={"count": 1}), tmp_path / "whole")
    (record,), (all_of_it,) = learned.records, whole.records
    assert record.bytes_up == 5 * 4 * (200 * 10 + 10)
    assert record.bytes_down == all_of_it.bytes_down


def test_a_client_that_sends_a_frozen_part_back_is_refused(small, learn, tmp_path):
    def grown(message, reply):
        reply.content["arrays"]["1.weight"] = message.content["frozen"]["1.weight"]
        return reply

    config = small(model={"name": "mlp"}, train={"freeze": ["1.*"]}, rounds={"count": 1})
    (record,) = learn(config, tmp_path, tamper={2: grown}).records
    assert record.clients == 4
    assert "array names differ: 1.weight" in record.rejected[0].reason


@pytest.mark.slow
@pytest.mark.parametrize(
    "privacy",
    [
        {"mechanism": "central", "accountant": "rdp"},
        {"mechanism": "local", "accountant": "rdp"},
        {"mechanism": "example", "accountant": "rdp"},
        {"secure_aggregation": True},
    ],
)
def test_noise_and_masks_leave_frozen_parts_alone(privacy, small, learn, tmp_path):
    config = small(
        model={"name": "mlp", "standardise": False},
        train={"freeze": ["1.*", "3.*"]},
        rounds={"count": 2},
        privacy=privacy,
    )
    same, moved = split(config, learn(config, tmp_path))
    assert same == ["1.weight", "1.bias", "3.weight", "3.bias"]
    assert moved == ["5.weight", "5.bias"]


@pytest.mark.slow
def test_a_frozen_run_resumes_bit_for_bit(small, learn, tmp_path):
    config = small(
        model={"name": "mlp"}, train={"freeze": ["1.*"]}, strategy={"name": "fedadam"}, rounds={"count": 4}
    )
    whole = learn(config, tmp_path / "whole")
    with pytest.raises(Exception, match=r"^$"):
        learn(config, tmp_path / "cut", stop_after=2)
    assert learn(config, tmp_path / "cut").model_sha256 == whole.model_sha256


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"train": {"freeze": ["2.*"]}}, "train.freeze: '2.\\*' matches no parameter"),
        ({"train": {"freeze": ["*"]}}, "nothing is left to train"),
        (
            {"train": {"freeze": ["1.*"]}, "strategy": {"name": "feddf", "models": "logistic"}},
            "clients have models of their own",
        ),
        ({"train": {"freeze": ["5.*"]}, "strategy": {"name": "fedper"}}, "lets each device train for itself"),
        (
            {"train": {"freeze": ["1.*", "3.*"]}, "strategy": {"name": "fedper"}},
            "nothing is left that clients learn together",
        ),
    ],
)
def test_what_leaves_nothing_to_do_is_refused_before_anything_runs(sections, says, small):
    with pytest.raises(ConfigError, match=says):
        prepare(small(model={"name": "mlp"}, **sections))


@pytest.mark.slow
def test_a_codec_works_on_what_is_not_frozen(small, learn, tmp_path):
    config = small(
        model={"name": "mlp"},
        train={"freeze": ["1.*"]},
        communication={"codec": ["int8"]},
        rounds={"count": 2},
    )
    same, moved = split(config, learn(config, tmp_path))
    assert same == ["1.weight", "1.bias"]
    assert len(moved) == 4


FREEZE = {"model": {"name": "mlp"}, "train": {"freeze": ["1.*", "3.*"]}}
KEEP = {**FREEZE, "communication": {"keep_frozen": True}}


def watching(seen, lose=()):
    """Around a ClientApp: who is sent what in which round; in those of `lose` client 2 has lost its state."""

    def around(honest):
        def call(message, context):
            if message.metadata.message_type == "train":
                number = message.content.config_records["config"]["server-round"]
                seen.append((number, context.node_id, "frozen" in message.content))
                if context.node_id == 2 and number in lose:
                    context.state.clear()
            return honest(message, context)

        return call

    return around


@pytest.mark.slow
def test_clients_that_keep_the_frozen_part_are_sent_it_once_and_learn_the_same(small, learn, tmp_path):
    seen = []
    kept = learn(small(**KEEP), tmp_path / "kept", around=watching(seen))
    plain = learn(small(**FREEZE, simulation={"engine": "sequential"}), tmp_path / "plain")
    assert [sent for number, _, sent in seen if number == 1] == [True] * 5
    assert [sent for number, _, sent in seen if number > 1] == [False] * 10
    assert [r.rejected for r in kept.records] == [()] * 3
    for name, value in arrays_of(plain.model.network).items():
        np.testing.assert_allclose(arrays_of(kept.model.network)[name], value, atol=2e-5)
    down = [r.bytes_down for r in kept.records]
    frozen = 4 * (64 * 200 + 200 + 200 * 200 + 200)
    assert [down[0] - down[1], down[1]] == [5 * frozen, 5 * 4 * (200 * 10 + 10)]
    assert down[1:] == down[2:] * 2


@pytest.mark.slow
def test_a_client_that_has_lost_the_frozen_part_is_sent_it_the_next_time(small, learn, tmp_path):
    seen = []
    records = learn(small(**KEEP, rounds={"count": 4}), tmp_path, around=watching(seen, lose=(2,))).records
    assert [r.clients for r in records] == [5, 4, 5, 5]
    assert "which this device does not hold" in records[1].rejected[0].reason
    assert [sent for _, node, sent in seen if node == 2] == [True, False, True, False]


@pytest.mark.slow
def test_clients_of_an_older_release_never_say_that_they_hold_anything(small, learn, tmp_path):
    seen = []

    def older(message, reply):
        reply.content["metrics"].pop("holds-frozen")
        return reply

    tamper = {2: older}
    records = learn(small(**KEEP), tmp_path / "a", tamper=tamper).records
    assert [r.clients for r in records] == [5] * 3
    frozen = 4 * (64 * 200 + 200 + 200 * 200 + 200)
    assert records[1].bytes_down - 5 * 4 * (200 * 10 + 10) == frozen
    assert not seen


@pytest.mark.slow
@pytest.mark.parametrize("sections", [{}, {"communication": {"keep_frozen": True, "codec": ["topk:0.1"]}}])
def test_an_interrupted_run_sends_the_frozen_part_to_the_same_clients(sections, small, learn, tmp_path):
    config = small(**{**KEEP, **sections}, rounds={"count": 5, "cohort": 3}, clients={"count": 6})
    whole = learn(config, tmp_path / "whole")
    with pytest.raises(Exception, match=r"^$"):  # the fixture's Interrupted
        learn(config, tmp_path / "cut", stop_after=2)
    resumed = learn(config, tmp_path / "cut")
    assert [(r.bytes_down, r.updates) for r in resumed.records] == [
        (r.bytes_down, r.updates) for r in whole.records
    ]
    assert (
        arrays_of(resumed.model.network)["5.weight"].tobytes()
        == arrays_of(whole.model.network)["5.weight"].tobytes()
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scaffold", "fedbuff", "ditto"])
def test_other_strategies_clients_keep_the_frozen_part_too(name, small, learn, tmp_path):
    seen = []
    sections = {**KEEP, "train": {**KEEP["train"], "momentum": 0.0}, "strategy": {"name": name}}
    if name == "fedbuff":
        sections["strategy"] = {"name": name, "buffer": 3}
    records = learn(small(**sections, rounds={"count": 4}), tmp_path, around=watching(seen)).records
    assert all(r.counted and not r.rejected for r in records)
    assert not all(sent for _, _, sent in seen)
    for node in range(1, 6):
        assert next(sent for _, each, sent in seen if each == node)


def test_under_masks_nobody_says_what_he_holds(small):
    config = small(
        **{**KEEP, "model": {"name": "mlp", "standardise": False}}, privacy={"secure_aggregation": True}
    )
    with pytest.raises(ConfigError, match="keep_frozen"):
        check(config, linear=True)
