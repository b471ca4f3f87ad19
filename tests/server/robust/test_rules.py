"""The robust rules on numbers worked by hand, against plain formulas, and under updates of any kind."""

from __future__ import annotations

import math

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given
from hypothesis import strategies as st

from fedge.learning.messages import from_record, to_record
from fedge.wire.arrays import FileArray
from fedge_server.strategies import PLAIN, robust
from fedge_server.strategies.robust import updates as tall
from fedge_server.strategies.robust.centred_clipping import clipped_weights
from fedge_server.strategies.robust.geometric_median import weiszfeld
from fedge_server.strategies.robust.mixing import krum_order, mixing_weights
from fedge_server.strategies.robust.updates import Updates
from fedge_server.strategies.state import capture

RULES = {
    "fedmedian": {"mixing": 0.2},
    "fedtrimmedavg": {"mixing": 0.2, "beta": 0.2},
    "krum": {"mixing": 0.2, "num_malicious_nodes": 2},
    "multikrum": {"mixing": 0.2, "num_malicious_nodes": 2, "num_nodes_to_select": 3},
    "geometricmedian": {},
    "centredclipping": {},
}
K = 10
every = pytest.mark.parametrize("name", list(RULES))


class Nodes:
    def get_node_ids(self):
        return range(1, K + 1)


def record(vector) -> ArrayRecord:
    """Two tensors of a vector, so that a rule must go over more than one."""
    vector = np.asarray(vector)
    middle = (len(vector) + 1) // 2
    return to_record({"w": vector[:middle].reshape(-1, 1), "b": vector[middle:]})


def reply(node: int, arrays: ArrayRecord, examples: int = 5) -> Message:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 9, 1
    metrics = MetricRecord({"num-examples": examples, "train_loss": 1.0})
    return Message(
        RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=Message(RecordDict(), node, "train")
    )


def made(name: str, vectors, origin=None, **options) -> np.ndarray:
    """The vector that a rule makes of vectors, through the messages of a round."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 9, 1
    rule = PLAIN[name](**{**RULES[name], **options})
    if origin is not None:
        rule.configure_train(1, record(origin), ConfigRecord(), Nodes())
    found, metrics = rule.aggregate_train(1, [reply(i, record(v)) for i, v in enumerate(vectors, 1)])
    assert metrics["train_loss"] == pytest.approx(1.0)
    capture(rule)
    return np.concatenate([value.reshape(-1) for value in from_record(found).values()])


def cloud(seed: int, count: int = K, size: int = 7) -> np.ndarray:
    return np.random.default_rng(seed).normal(3.0, 1.0, (count, size))


def distances(vectors) -> np.ndarray:
    return np.linalg.norm(vectors[:, None] - vectors[None], axis=2)


def test_mixing_takes_the_mean_of_the_nearest():
    # Each of 0, 1, 2 has these three as its nearest; 10 has 10, 2, 1.
    line = np.array([[0.0], [1.0], [2.0], [10.0]])
    mixed = mixing_weights(line @ line.T, 0.25) @ line
    np.testing.assert_allclose(mixed[:, 0], [1, 1, 1, 13 / 3])
    assert made("fedmedian", [[0.0], [1.0], [2.0], [10.0]], mixing=0.25).tolist() == [1.0]
    # The middle two of (1, 1, 1, 13 / 3) have the mean 1 also where a quarter is cut off at either end.
    assert made("fedtrimmedavg", [[0.0], [1.0], [2.0], [10.0]], mixing=0.25, beta=0.25).tolist() == [1.0]
    assert made("krum", [[0.0], [1.0], [2.0], [10.0]], mixing=0.25, num_malicious_nodes=1).tolist() == [1.0]


def test_as_many_are_left_out_as_the_share_rounded_up():
    eye = np.eye(10)
    assert [(mixing_weights(eye, share) > 0).sum(axis=1)[0] for share in (0.0, 0.1, 0.3, 0.31)] == [
        10,
        9,
        7,
        6,
    ]


def test_krum_adds_up_the_squares_to_the_nearest_others():
    # Of 0, 1, 3, 9 with f = 1 the nearest other counts: 1, 1, 4, 36.
    line = np.array([[3.0], [0.0], [1.0], [9.0]])
    assert krum_order(line @ line.T, 1) == [1, 2, 0, 3]


def test_the_geometric_median_of_a_line_is_the_middle_and_of_a_triangle_its_centre():
    assert made("geometricmedian", [[0.0], [1.0], [50.0]]) == pytest.approx([1.0], abs=1e-5)
    corners = [[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(0.75)]]
    assert made("geometricmedian", corners) == pytest.approx([0.5, math.sqrt(0.75) / 3])


def test_centred_clipping_begins_at_the_median_and_clips_around_it():
    # From 2: 0 is 2 away and 10 is 8 away. (-1 + 0 + 1) / 3 with radius 1, (-2 + 0 + 4) / 3 with radius 4.
    line = [[0.0], [2.0], [10.0]]
    assert made("centredclipping", line, radius=1.0, iterations=1) == pytest.approx([2.0])
    assert made("centredclipping", line, radius=4.0, iterations=1) == pytest.approx([2.0 + 2 / 3])
    # From there 8/3, 2/3 and 22/3 away: (-8/3 - 2/3 + 4) / 3 = 2 / 9.
    assert made("centredclipping", line, radius=4.0, iterations=2) == pytest.approx([2.0 + 2 / 3 + 2 / 9])
    assert made("centredclipping", line, iterations=1) == pytest.approx([2.0])  # the median distance is 2


@pytest.mark.parametrize("seed", range(3))
def test_mixed_rules_are_what_plain_formulas_give(seed):
    vectors, origin = cloud(seed), cloud(seed + 10)[0]
    kept = np.argsort(distances(vectors), axis=1)[:, :8]
    mixed = np.stack([vectors[near].mean(axis=0) for near in kept])
    ordered = np.sort(mixed, axis=0)
    squares = np.sort(distances(mixed) ** 2, axis=1)[:, 1:7].sum(axis=1)  # n - f - 2 = 6
    best = mixed[np.argsort(squares)]
    for name, expected in {
        "fedmedian": np.median(mixed, axis=0),
        "fedtrimmedavg": ordered[2:8].mean(axis=0),
        "krum": best[0],
        "multikrum": best[:3].mean(axis=0),
    }.items():
        np.testing.assert_allclose(made(name, vectors, origin), expected, rtol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_at_the_geometric_median_unit_vectors_to_the_updates_cancel(seed):
    vectors = cloud(seed)
    found = made("geometricmedian", vectors, cloud(9)[0])
    away = vectors - found
    assert np.linalg.norm((away / np.linalg.norm(away, axis=1, keepdims=True)).sum(axis=0)) < 1e-6


@pytest.mark.parametrize("seed", range(3))
def test_centred_clipping_is_what_its_formula_gives(seed):
    vectors = cloud(seed)
    v = np.median(vectors, axis=0)
    reach = np.median(np.linalg.norm(vectors - v, axis=1))
    for _ in range(4):
        away = vectors - v
        v = v + (away * np.minimum(1, reach / np.linalg.norm(away, axis=1))[:, None]).mean(axis=0)
    np.testing.assert_allclose(made("centredclipping", vectors, cloud(5)[0], iterations=4), v, rtol=1e-12)


@every
def test_the_order_of_updates_does_not_matter(name):
    vectors = cloud(4)
    shuffled = vectors[np.random.default_rng(0).permutation(K)]
    np.testing.assert_allclose(made(name, vectors), made(name, shuffled), rtol=1e-9)


@every
def test_blocks_and_files_change_nothing(name, tmp_path, monkeypatch):
    whole = made(name, vectors := cloud(6).astype(np.float32), origin := np.ones(7, np.float32))
    monkeypatch.setattr(tall, "BLOCK_VALUES", 3 * K)  # blocks of three values, the last one shorter
    path, offset, records = tmp_path / "updates", 0, []
    with path.open("wb") as file:
        for vector in vectors:
            filed = ArrayRecord()
            for key, value in from_record(record(vector)).items():
                filed[key] = FileArray(path, offset, "float32", value.shape)
                offset += file.write(value.tobytes())
            records.append(filed)
    rule = PLAIN[name](**RULES[name])
    rule.configure_train(1, record(origin), ConfigRecord(), Nodes())
    found, _ = rule.aggregate_train(1, [reply(i, each) for i, each in enumerate(records, 1)])
    flat = np.concatenate([value.reshape(-1) for value in from_record(found).values()])
    assert flat.dtype == np.float32
    np.testing.assert_allclose(flat, whole, rtol=1e-6)


@every
@pytest.mark.parametrize("vectors", [np.zeros((K, 3)), np.ones((1, 3)), np.ones((2, 1))])
def test_equal_updates_and_single_ones_stay_what_they_are(name, vectors):
    np.testing.assert_allclose(made(name, vectors, np.zeros(vectors.shape[1])), vectors[0], rtol=1e-12)


@every
@given(
    seed=st.integers(0, 2**32),
    size=st.integers(1, 6),
    wild=st.lists(st.floats(-1e30, 1e30), min_size=2, max_size=2),
    alike=st.booleans(),
)
def test_two_of_ten_cannot_move_the_result_far_whatever_they_send(name, seed, size, wild, alike):
    """Within a few times the honest updates' own spread, and if they send what float32 holds no more of."""
    rng = np.random.default_rng(seed)
    honest = rng.normal(3.0, 1.0, (8, size))
    hostile = np.array(wild)[:, None] * (np.ones(size) if alike else rng.normal(size=size))
    found = made(name, np.concatenate([honest, hostile]), np.full(size, 2.0))
    centre = honest.mean(axis=0)
    spread = np.linalg.norm(honest - centre, axis=1).max()
    assert np.linalg.norm(found - centre) <= 4 * spread + 1e-6


def test_the_plain_mean_can_be_moved_as_far_as_one_likes():
    vectors = np.concatenate([cloud(0)[:8], np.full((2, 7), 1e30)])
    found, _ = PLAIN["fedavg"]().aggregate_train(1, [reply(i, record(v)) for i, v in enumerate(vectors, 1)])
    assert found["w"].numpy().min() > 1e29


@pytest.mark.parametrize("name", ["fedmedian", "fedtrimmedavg", "krum", "multikrum"])
def test_without_mixing_it_is_flowers_rule_to_the_bit(name):
    own = next(getattr(flower, each) for each in flower.__all__ if each.lower() == name)
    options = {key: value for key, value in RULES[name].items() if key != "mixing"}
    vectors = cloud(2).astype(np.float32)
    found = []
    for rule in (PLAIN[name](**options), own(**options)):
        rule.configure_train(1, record(vectors[0]), ConfigRecord(), Nodes())
        arrays, _ = rule.aggregate_train(1, [reply(i, record(v)) for i, v in enumerate(vectors, 1)])
        found.append({key: value.numpy().tobytes() for key, value in arrays.items()})
    assert found[0] == found[1]


def test_examples_that_a_client_claims_give_it_no_more_weight():
    vectors = cloud(1)
    for name, options in RULES.items():
        rule = PLAIN[name](**options)
        claims = [10**9] + [1] * (K - 1)
        arrays, _ = rule.aggregate_train(
            1, [reply(i, record(v), n) for i, (v, n) in enumerate(zip(vectors, claims, strict=True), 1)]
        )
        flat = np.concatenate([value.reshape(-1) for value in from_record(arrays).values()])
        np.testing.assert_allclose(flat, made(name, vectors), rtol=1e-12)


def test_what_weighs_nothing_is_not_read():
    broken = ArrayRecord()
    broken["w"] = FileArray(None, 0, "float64", (1,))  # reading it would fail
    one = to_record({"w": np.array([4.0])})
    found = Updates([one, broken]).combined(np.array([0.5, 0.0]))
    assert found["w"].numpy().tolist() == [2.0]


def test_nothing_is_kept_of_a_round_and_no_answers_give_no_model():
    rule = robust.GeometricMedian()
    rule.configure_train(1, record(np.ones(4)), ConfigRecord(), Nodes())
    assert rule.aggregate_train(1, []) == (None, None)
    assert rule.origin is None


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: robust.FedMedian(mixing=0.5), "mixing 0.5"),
        (lambda: robust.Krum(mixing=-0.1), "mixing -0.1"),
        (lambda: robust.GeometricMedian(smoothing=0.0), "smoothing 0.0"),
        (lambda: robust.CentredClipping(radius=-1.0), "radius -1.0"),
        (lambda: robust.CentredClipping(iterations=0), "iterations 0"),
    ],
)
def test_options_out_of_range_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_weights_add_up_to_one_also_where_nobody_moved():
    assert weiszfeld(np.zeros((4, 4)), 1e-6).tolist() == [0.25] * 4
    assert clipped_weights(np.zeros((4, 4)), 0.0, 3).sum() == pytest.approx(1.0)
