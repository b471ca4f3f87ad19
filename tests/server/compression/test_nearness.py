from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from fedge import delta
from fedge.artefact import pack
from fedge.config import Config
from fedge.inference import CompactModel
from fedge_server.compression import keeping
from fedge_server.compression.candidates import Candidate
from fedge_server.compression.gate import MAX_ATTEMPTS
from fedge_server.compression.keeping import MOST_OFF, Keeper
from fedge_server.compression.layer_inputs import divergence, inputs_of
from fedge_server.compression.measure import Cost
from fedge_server.compression.nearness import PRICES, alike, near
from fedge_server.compression.onnx_graph import load
from fedge_server.compression.outcome import Sitting
from fedge_server.compression.quantise import quantise
from fedge_server.compression.recipes import Architecture, Recipe
from fedge_server.compression.sources import OnServer
from fedge_server.data import ServerData

INT8 = Recipe(Architecture(), "int8")


def constants(graph: bytes) -> dict:
    return {each.name: numpy_helper.to_array(each) for each in load(graph).graph.initializer}


def moved_by(graph: bytes, size: float) -> bytes:
    """The graph after a round in which every weight moved by about so much of the layer's spread."""
    model, rng = load(graph), np.random.default_rng(0)
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype == np.float32 and values.ndim == 2:
            noise = rng.normal(0, size * values.std(), values.shape).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(values + noise, tensor.name))
    return model.SerializeToString(deterministic=True)


@pytest.fixture(scope="module")
def rounds(exported, digits):
    """The last release's int8 graph, the next one's weights, and these freshly rounded."""
    seen, after = digits.proxy.x[:64], moved_by(exported, 0.05)
    return SimpleNamespace(
        exact=after,
        base=quantise(exported, seen),
        fresh=quantise(after, seen),
        inputs=inputs_of(after, digits.proxy.x),
    )


@pytest.fixture(scope="module")
def versions(rounds):
    return list(near(rounds.fresh, rounds.base, rounds.exact, rounds.inputs))


def test_few_codes_change_and_the_answers_are_those_of_the_new_weights(rounds, versions, digits):
    def answers(graph):
        return CompactModel(graph, digits.spec).run(digits.gate.x)[1]

    def off(graph):
        return np.abs(answers(graph) - answers(rounds.exact)).mean()

    assert [each.price for each in versions] == list(PRICES)
    assert sorted(each.changed for each in versions) == [each.changed for each in versions]
    nearest, farthest = versions[0].graph, versions[-1].graph
    assert versions[0].changed < 0.05
    assert versions[-1].changed < 0.35 < changed_codes(rounds.base, rounds.fresh)
    assert len(delta.make(rounds.base, nearest)) < len(delta.make(rounds.base, rounds.fresh)) / 3
    assert off(farthest) < off(nearest) < 0.7 * off(rounds.base)
    assert off(farthest) < 0.3 * off(rounds.base)


def changed_codes(one: bytes, other: bytes) -> float:
    a, b = constants(one), constants(other)
    codes = [name for name, value in a.items() if value.dtype == np.int8 and value.ndim == 2]
    return sum((a[name] != b[name]).sum() for name in codes) / sum(a[name].size for name in codes)


def test_scales_and_ranges_that_fit_stay_and_those_of_biases_follow(rounds, versions):
    values, before = constants(versions[0].graph), constants(rounds.base)
    model = load(versions[0].graph)
    widen = {node.output[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
    layers = [node for node in model.graph.node if node.op_type == "Gemm"]
    assert len(layers) == 3
    for layer in layers:
        x, weight, bias = (widen[name].input[1] for name in layer.input)
        assert (values[weight] == before[weight]).all()
        np.testing.assert_array_equal(values[bias], values[x] * values[weight])
    codes = [values[widen[layer.input[1]].input[0]] for layer in layers]
    assert all(np.abs(each.astype(int)).max() <= 64 for each in codes)


def test_a_scale_that_the_weights_have_outgrown_is_taken_anew(rounds, exported, digits):
    model = load(exported)
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor).copy()
        if values.shape == (64, 64):
            values[0] *= 2
            values[1] *= 0.4
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    grown = model.SerializeToString(deterministic=True)
    fresh = quantise(grown, digits.proxy.x[:64])
    made = next(near(fresh, rounds.base, grown, inputs_of(grown, digits.proxy.x)))
    name = next(
        key for key, value in constants(fresh).items() if value.dtype == np.int8 and value.shape == (64, 64)
    )
    widen = next(node for node in load(fresh).graph.node if name in node.input)
    kept, new, old = (constants(graph)[widen.input[1]] for graph in (made.graph, fresh, rounds.base))
    assert (kept[:2] == new[:2]).all()
    assert (kept[2:] == old[2:]).all()


def test_it_is_the_same_each_time_and_another_graph_has_no_such_version(rounds, versions, exported):
    again = next(near(rounds.fresh, rounds.base, rounds.exact, rounds.inputs))
    assert again == versions[0]
    assert alike(rounds.base, versions[0].graph)
    assert not alike(rounds.fresh, exported)
    assert list(near(rounds.fresh, exported, rounds.exact, rounds.inputs)) == []
    assert list(near(rounds.fresh, rounds.base, rounds.exact, rounds.inputs[1:])) == []


def test_inputs_of_a_convolution_are_the_patches_under_its_kernel():
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(4, 2, 3, 2)).astype(np.float32)
    node = helper.make_node(
        "Conv", ["input", "w"], ["probabilities"], strides=[2, 1], pads=[1, 0, 0, 1], dilations=[1, 2]
    )
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", 2, 6, 5])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    x = rng.normal(size=(5, 2, 6, 5)).astype(np.float32)
    (found,) = inputs_of(model.SerializeToString(), x)
    padded = torch.nn.functional.pad(torch.from_numpy(x), (0, 1, 1, 0))
    patches = torch.nn.functional.unfold(padded, (3, 2), dilation=(1, 2), stride=(2, 1))
    rows = patches.transpose(1, 2).reshape(-1, 12).numpy()
    np.testing.assert_allclose(found.second, rows.T @ rows / len(rows), atol=1e-5)
    np.testing.assert_allclose(found.mean, rows.mean(axis=0), atol=1e-5)


def test_an_output_whose_weights_died_is_all_but_silenced_and_the_others_keep_codes(rounds, digits):
    """onnxruntime gives the scale 1 to weights that are all 0, which must price nothing."""
    model = load(rounds.exact)
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor).copy()
        if values.shape == (64, 64):
            values[3] = 0
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    dead = model.SerializeToString(deterministic=True)
    fresh = quantise(dead, digits.proxy.x[:64])
    made = list(near(fresh, rounds.base, dead, inputs_of(dead, digits.proxy.x)))
    assert 0 < made[0].changed < 0.1
    assert made[-1].changed > 0.1
    codes, scale = _weights(made[-1].graph, (64, 64))
    before, _ = _weights(rounds.base, (64, 64))
    assert np.abs(before[3]).max() == 64
    assert np.abs(codes[3]).max() <= 1
    assert scale.max() < 0.1


def _weights(graph: bytes, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    values = constants(graph)
    name = next(key for key, value in values.items() if value.dtype == np.int8 and value.shape == shape)
    widen = next(node for node in load(graph).graph.node if name in node.input)
    return values[name].astype(int), values[widen.input[1]].reshape(-1, 1)


def test_an_error_is_worth_what_it_does_to_the_answers(rounds, exported, digits):
    worth = [each.sensitivity for each in rounds.inputs]
    assert min(worth) > 0
    assert max(worth) > 2 * min(worth)
    again = [each.sensitivity for each in inputs_of(rounds.exact, digits.proxy.x)]
    assert again == worth
    dead = load(exported)
    for tensor in dead.graph.initializer:
        if tuple(tensor.dims) == (64, 64):
            tensor.CopyFrom(numpy_helper.from_array(np.zeros((64, 64), np.float32), tensor.name))
    found = [each.sensitivity for each in inputs_of(dead.SerializeToString(), digits.proxy.x)]
    assert found[0] == 0.0  # nothing of the first layer comes through the second
    assert found[1] == 0.0  # which has no weights for the noise to be measured by


def test_divergence_is_that_of_kullback_and_leibler():
    exact, answers = np.float32([[0.5, 0.5], [1.0, 0.0]]), np.float32([[0.25, 0.75], [1.0, 0.0]])
    assert divergence(exact, exact) == 0.0
    assert divergence(exact, answers) == pytest.approx(
        0.5 * (0.5 * np.log(2) + 0.5 * np.log(2 / 3)), rel=1e-6
    )
    assert np.isfinite(divergence(np.float32([[1.0, 0.0]]), np.float32([[0.0, 1.0]])))


@pytest.fixture
def keeper(rounds, trained, digits):
    """Keeps near the last variant of the tier "old", with real selection data."""
    data = ServerData(digits.spec, digits.proxy, digits.gate, digits.gate)
    source = OnServer.of("labelled", Config(), data, trained)
    workshop = SimpleNamespace(exact=lambda _: rounds.exact)
    return Keeper(workshop, source, {"old": rounds.base, "other": rounds.exact})


def candidate(graph: bytes, keeper: Keeper) -> Candidate:
    cost = Cost(graph, pack(graph), {1: 10.0}, 1000)
    return Candidate(INT8, cost, 5000, keeper.source.selection(cost.wire, len(graph)), 1.0)


@pytest.mark.slow
def test_a_tier_with_a_last_variant_gets_the_nearest_version_that_is_as_good_then_the_fresh_one(
    keeper, rounds
):
    fresh = candidate(rounds.fresh, keeper)
    first, last = keeper.versions(fresh, "old")
    assert last == replace(fresh, delta_bytes=len(delta.make(rounds.base, rounds.fresh)))
    assert first.delta_bytes == len(delta.make(rounds.base, first.cost.installed)) < 0.5 * last.delta_bytes
    exact, near_, plain = (
        keeper.source.probabilities(graph)
        for graph in (rounds.exact, first.cost.installed, fresh.cost.installed)
    )
    assert divergence(exact, near_) <= divergence(exact, plain) + MOST_OFF
    known = keeper.source.selection(first.cost.wire, len(first.cost.installed))
    assert (first.counts.losses == known.losses).all()
    assert 0 < first.changed < 0.35
    assert keeper.versions(fresh, "old") == (first, last)


def test_without_a_last_variant_of_the_same_graph_nothing_changes(keeper, rounds):
    fresh = candidate(rounds.fresh, keeper)
    assert keeper.versions(fresh, "new") == keeper.versions(fresh, "other") == (fresh,)


@pytest.mark.slow
def test_where_nothing_near_is_as_good_or_the_time_is_up_only_the_fresh_one_is_left(
    keeper, rounds, monkeypatch
):
    fresh = candidate(rounds.fresh, keeper)
    nobody_knows = replace(keeper.source, apart=keeper.source.apart.take(np.arange(0)))
    for other in (replace(keeper, source=nobody_knows), replace(keeper, deadline=0.0)):
        assert [each.changed for each in other.versions(fresh, "old")] == [None]
    monkeypatch.setattr(keeping, "MOST_OFF", -1.0)
    assert [each.changed for each in keeper.versions(fresh, "old")] == [None]


class _Judge:
    """A gate that lets through what it is told to, by attempt."""

    def __init__(self, *passing: int) -> None:
        self.config, self.examples = Config.from_mapping({"tiers": {"old": {}}}), 1000
        self.sat: list[Candidate] = []
        self._passing = passing

    def evidence(self, _candidate):
        return SimpleNamespace(probabilities=None)

    def routing(self, _candidate):
        return None

    def sit(self, candidate, _tier, attempt):
        self.sat.append(candidate)
        passed = attempt in self._passing
        return SimpleNamespace(
            passed=passed, reasons=("no",), attempt=attempt, accuracy=0.9, drop=0.0, drop_upper=0.0
        )


@pytest.mark.parametrize(
    ("passing", "changed", "seat"),
    [((1,), 0.1, 1), ((2,), None, 2), ((), None, None)],
    ids=["near passes", "near is refused", "both are"],
)
def test_the_gate_sees_what_is_near_first_and_the_fresh_version_where_it_refuses(
    keeper, rounds, passing, changed, seat
):
    fresh = candidate(rounds.fresh, keeper)
    judge, close = _Judge(*passing), replace(fresh, changed=0.1, delta_bytes=100)
    outcome = Sitting("old", judge, lambda each, _: (close, each)).outcome([fresh], ())
    assert [each.changed for each in judge.sat] == [0.1, None][: seat or 2]
    assert [each.changed for each in outcome.tried] == [0.1, None]
    if seat is None:
        assert outcome.variant is None
    else:
        assert outcome.variant.changed == changed
        assert ("100 bytes from the last variant" in outcome.reason) == (seat == 1)


def test_the_last_attempt_is_not_spent_on_what_is_near(keeper, rounds):
    one = candidate(rounds.fresh, keeper)
    every = [replace(one, recipe=replace(INT8, architecture=Architecture(student=name))) for name in "ab"]
    judge = _Judge()
    Sitting("old", judge, lambda each, _: (replace(each, changed=0.1), each)).outcome(every, ())
    assert [each.changed for each in judge.sat] == [0.1, None, None]
    assert len(judge.sat) == MAX_ATTEMPTS
