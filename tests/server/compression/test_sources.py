"""Where compression learns about data: chosen by what there is, and nothing made up where there is none."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedge.artefact import pack
from fedge.config import Config
from fedge.errors import CompressionError, ConfigError
from fedge_server.compression import distil as distilling
from fedge_server.compression.choose import source_of
from fedge_server.compression.export import export
from fedge_server.compression.gate import evidence_of, score
from fedge_server.compression.quantise import quantise
from fedge_server.compression.routing import routing_of
from fedge_server.compression.sources import OnServer, kind_of, parts
from fedge_server.data import ServerData
from fedge_server.rounds.scoring import probabilities_of


def config(kind="auto", holdout=0.0, **sections):
    return Config.from_mapping(
        {"compress": {"data": kind}, "evaluate": {"client_holdout": holdout}, **sections}
    )


@pytest.fixture
def server(digits):
    return ServerData(digits.spec, digits.proxy, digits.gate, digits.gate)


def nothing_of(examples):
    return examples.take(np.arange(0))


@pytest.mark.parametrize(
    ("named", "proxy", "clients", "holdout", "kind"),
    [
        ("auto", True, True, 0.2, "labelled"),
        ("auto", True, False, 0.0, "labelled"),
        ("auto", False, True, 0.2, "clients"),
        ("auto", False, True, 0.0, "none"),
        ("auto", False, False, 0.2, "none"),
        ("clients", True, True, 0.2, "clients"),
        ("unlabelled", True, True, 0.0, "unlabelled"),
        ("none", True, True, 0.2, "none"),
    ],
)
def test_the_source_is_chosen_by_what_there_is(digits, named, proxy, clients, holdout, kind):
    own = digits.proxy if proxy else nothing_of(digits.proxy)
    assert kind_of(config(named, holdout), own, clients=clients) == kind


@pytest.mark.parametrize(
    ("settings", "clients", "why"),
    [
        (config("labelled"), True, "raise evaluate.proxy_fraction"),
        (config("unlabelled"), True, "raise evaluate.proxy_fraction"),
        (config("clients", 0.2), False, "no client to be asked here"),
        (config("clients"), True, "set evaluate.client_holdout"),
        (
            config("clients", 0.2, privacy={"mechanism": "central"}, model={"standardise": False}),
            True,
            "which neither a privacy.mechanism",
        ),
        (
            config("clients", 0.2, privacy={"secure_aggregation": True}, model={"standardise": False}),
            True,
            "nor privacy.secure_aggregation covers",
        ),
    ],
)
def test_a_source_that_is_not_there_is_refused_with_what_to_do(digits, settings, clients, why):
    with pytest.raises(ConfigError, match=why):
        kind_of(settings, nothing_of(digits.proxy), clients=clients)


def test_with_privacy_nobody_chooses_clients_unasked(digits):
    settings = config("auto", 0.2, privacy={"secure_aggregation": True}, model={"standardise": False})
    assert kind_of(settings, nothing_of(digits.proxy), clients=True) == "none"


@pytest.mark.slow
def test_labelled_data_teach_calibrate_order_and_judge_each_with_their_own(server, teacher, helpers):
    settings = config()
    source = source_of(settings, helpers.task(), server, teacher)
    training, apart = parts(server.proxy, 0)
    assert (source.kind, source.learns) == ("labelled", True)
    assert f"{len(training)} proxy examples with labels" in source.describe()
    torch.manual_seed(0)
    student, learning = helpers.mlp(16), replace(settings.compress.distil, epochs=2)
    x = distilling.preprocessed(teacher.preprocess, training.x)
    expected = distilling.distil(teacher.network, student, x, torch.from_numpy(training.y), learning, seed=0)
    found = source.teach(student, learning, model="", seed=0)
    assert helpers.same(helpers.weights(found), helpers.weights(expected))
    graph = export(teacher, server.spec)
    order = np.random.default_rng(0).permutation(len(training))
    compact = source.calibrate(graph)
    assert compact == quantise(graph, training.x[order[:256]])
    wire = pack(compact)
    answers = score(wire, len(compact), server.spec, apart.x)
    counts = source.selection(wire, len(compact))
    assert counts.accuracy == (answers.argmax(1) == apart.y).mean()
    judged = score(wire, len(compact), server.spec, server.gate.x)
    wanted = evidence_of(judged, probabilities_of(teacher, server.gate), server.gate.y, 10)
    evidence = source.evidence(wire, len(compact))
    assert evidence.clients is None
    assert evidence.counts.losses.tolist() == wanted.counts.losses.tolist()


@pytest.mark.slow
def test_without_labels_the_labels_are_not_looked_at(server, teacher, helpers):
    wrong = replace(server, proxy=replace(server.proxy, y=np.roll(server.proxy.y, 1)))
    kinds = [source_of(config("unlabelled"), helpers.task(), data, teacher) for data in (server, wrong)]
    # The same examples in both: labels also divide the proxy data, so the parts are taken from one of them.
    training, apart = parts(server.proxy, 0)
    ends = []
    for source, y in zip(kinds, (0, 1), strict=True):
        same = replace(
            source,
            training=replace(training, y=np.roll(training.y, y)),
            apart=replace(apart, y=np.roll(apart.y, y)),
        )
        torch.manual_seed(0)
        learning = replace(config().compress.distil, epochs=2)
        taught = same.teach(helpers.mlp(16), learning, model="", seed=0)
        installed = export(type(teacher)(teacher.preprocess, taught), server.spec)
        counts = same.selection(pack(installed), len(installed))
        ends.append((helpers.weights(taught), counts))
    assert helpers.same(ends[0][0], ends[1][0])
    assert ends[0][1].both.tolist() == ends[1][1].both.tolist()
    # The teacher is right by definition: agreement is what is counted.
    assert ends[0][1].wins.sum() == 0
    assert ends[0][1].teacher_accuracy == 1


@pytest.mark.slow
def test_nothing_is_distilled_or_calibrated_from_nothing(server, teacher, helpers):
    source = source_of(config("none"), helpers.task(), server, teacher)
    assert (source.kind, source.learns) == ("none", False)
    assert "only the unchanged global model" in source.describe()
    with pytest.raises(CompressionError, match="no data to learn from"):
        source.teach(helpers.mlp(8), config().compress.distil, model="", seed=0)
    graph = export(copy.deepcopy(teacher), server.spec)
    with pytest.raises(CompressionError, match="no calibration data"):
        source.calibrate(graph)
    assert source.selection(pack(graph), len(graph)) is None
    evidence = source.evidence(pack(graph), len(graph))
    assert (int(evidence.counts.losses.sum()), evidence.counts.examples) == (0, len(server.gate))
    assert isinstance(source, OnServer)


def test_a_choice_among_many_recipes_makes_thresholds_more_cautious():
    n = 2000
    doubt = np.linspace(0, 0.9, n).astype(np.float32)
    answers = np.stack([1 - doubt / 2, doubt / 2], axis=1)  # doubts 0 to 0.45
    truth = (doubt > 0.8).astype(np.int64)  # the device always says 0: it errs where it doubts most
    teacher = np.eye(2, dtype=np.float32)[truth]
    settings = Config.from_mapping({"compress": {"routing": {"gap": 0.05}}}).compress.routing
    one = routing_of(answers, teacher, truth, settings, among=1, labelled=True)
    many = routing_of(answers, teacher, truth, settings, among=100, labelled=True)
    assert one.rule is not None
    assert many.rule is not None
    assert 0.4 < many.rule.threshold < one.rule.threshold < 0.45  # more caution among many
    assert (one.confidence, many.confidence) == (0.95, pytest.approx(0.9995))
    assert one.accuracies
    assert routing_of(answers, teacher, truth, settings, among=1, labelled=False).accuracies == {}
    answers[7] = np.nan
    assert "NaN" in routing_of(answers, teacher, truth, settings, among=1, labelled=True).reason


@pytest.mark.slow
def test_routing_is_calibrated_without_the_gates_data(server, teacher, helpers):
    graph = export(copy.deepcopy(teacher), server.spec)
    wire, length = pack(graph), len(graph)

    def routing(data, kind="labelled"):
        return source_of(config(kind), helpers.task(), data, teacher).routing(wire, length, 10)

    found = routing(server)
    assert found.shares or found.rule
    order = np.random.default_rng(0).permutation(len(server.proxy))
    other = ServerData(server.spec, server.proxy, server.test, server.proxy.take(order))
    assert routing(other) == found
    assert "no proxy data" in routing(server, "none").reason
