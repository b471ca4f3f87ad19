"""Clients who teach, calibrate and count: what it comes to, who cannot spoil it, which data are for what."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, MetricRecord

from fedge.artefact import pack
from fedge.config import Config, Tier
from fedge.counts import Counts
from fedge.errors import CompressionError, TimeUpError
from fedge.holdout import judged_on, kept_back, places
from fedge.learning.messages import METRICS, to_record
from fedge.learning.surveys import COUNTS, RANGES, Survey
from fedge.learning.whole import WholeModel
from fedge.ranges import Ranges, observe
from fedge.statistics import Moments
from fedge.wire.arrays import put, records_of
from fedge_client.surveying import judging
from fedge_server import app as server_app
from fedge_server.compression.clients import Clients, Fleet, left_out, merged
from fedge_server.compression.export import export
from fedge_server.compression.gate import decide, evidence_of, score
from fedge_server.compression.quantise import quantise_within, watched
from fedge_server.rounds.scoring import probabilities_of
from fedge_simulations.world import prepare

HELD, SELECTION = 0.3, 0.4


class Field:
    """Five clients over the digits, a global model that knows a little, and a variant of it."""

    def __init__(self, folder, tamper=None, count=5, **clients):
        self.config = Config.from_mapping(
            {
                "model": {"name": "mlp"},
                "clients": {"count": count},
                "evaluate": {"client_holdout": HELD, "proxy_fraction": 0.0},
                "compress": {
                    "data": "clients",
                    "clients": {"rounds": 2, "epochs": 1, "selection_share": SELECTION, **clients},
                },
                "simulation": {"engine": "sequential"},
            }
        )
        self.world, self.said = prepare(self.config), []
        data = self.world.dataset
        moments = Moments.of(data.x, data.spec)
        torch.manual_seed(0)
        network = self.world.task.model("mlp")(data.spec)
        inputs = self.world.task.preprocess(data.spec, moments, "none")
        optimizer = torch.optim.Adam(network.parameters(), 0.01)
        x, y = inputs(torch.from_numpy(data.x)), torch.from_numpy(data.y)
        for _ in range(8):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(x), y).backward()
            optimizer.step()
        self.model = WholeModel(inputs, network.eval())

        def around(app):
            def call(message, context):
                reply = app(message, context)
                if context.node_id == 2 and tamper is not None:
                    tamper(reply)
                return reply

            return call

        def over(home):
            settings = server_app.run_config(self.config, home, "s")
            return closing(self.world.grid(settings, around=around))

        fleet = Fleet(over, folder)
        server = self.world.server
        self.clients = Clients(
            self.config, self.world.task, server, fleet, self.model, moments, self.said.append
        )

    @property
    def graph(self):
        return export(self.model, self.world.dataset.spec)

    def own(self, client):
        return self.world.dataset.examples.take(self.world.clients[client])

    def part(self, client, part):
        own = self.own(client)
        return own.take(np.flatnonzero(judged_on(places(own.x, self.config.seed), HELD, part, SELECTION)))


@pytest.fixture(scope="module")
def field(tmp_path_factory):
    return Field(tmp_path_factory.mktemp("fleet"))


@pytest.fixture(scope="module")
def variant(field):
    return field.clients.calibrate(field.graph)


@pytest.mark.slow
def test_ranges_are_those_of_what_clients_train_on_but_for_the_outermost(field, variant):
    parts = []
    for client in range(5):
        own = field.own(client)
        trained = own.take(np.flatnonzero(~kept_back(places(own.x, field.config.seed), HELD)))
        assert len(trained) > 150
        parts.append(observe(watched(field.graph), trained.x))
    exact = merged([part.coarse() for part in parts], 0.1)
    assert quantise_within(field.graph, exact) == variant or len(trained) > 256
    spec = field.world.dataset.spec
    same = score(pack(variant), len(variant), spec, field.own(0).x).argmax(1)
    assert (same == probabilities_of(field.model, field.own(0)).argmax(1)).mean() > 0.98


@pytest.mark.slow
def test_evidence_counts_what_the_same_examples_in_one_place_would(field, variant):
    found = field.clients.evidence(pack(variant), len(variant))
    pooled = [field.part(client, "gate") for client in range(5)]
    x, y = np.concatenate([part.x for part in pooled]), np.concatenate([part.y for part in pooled])
    whole = replace(pooled[0], x=x, y=y)
    spec = field.world.dataset.spec
    expected = evidence_of(
        score(pack(variant), len(variant), spec, x), probabilities_of(field.model, whole), y, 10
    )
    for name in ("n", "both", "losses", "wins"):
        assert getattr(found.counts, name).tolist() == getattr(expected.counts, name).tolist()
    assert (found.clients, found.faults) == (5, ())
    report = decide(found, labels=spec.labels, tier=Tier(max_drop=0.1), settings=field.config.compress.gate)
    assert (report.clients, report.n) == (5, len(y))


@pytest.mark.slow
def test_selection_is_counted_on_other_examples(field, variant):
    found = field.clients.selection(pack(variant), len(variant)).accuracy
    pooled = [field.part(client, "selection") for client in range(5)]
    x, y = np.concatenate([part.x for part in pooled]), np.concatenate([part.y for part in pooled])
    spec = field.world.dataset.spec
    assert found == (score(pack(variant), len(variant), spec, x).argmax(1) == y).mean()


def test_no_example_trains_selects_and_gates_not_even_as_a_copy_or_on_another_client():
    rng = np.random.default_rng(0)
    first = rng.integers(0, 255, (400, 8, 8)).astype(np.uint8)
    # Another client holds copies of these among others, in another order.
    second = np.concatenate([rng.integers(0, 255, (300, 8, 8)).astype(np.uint8), first[::-1]])
    seen = {}
    for x in (first, second):
        where = places(x, 7)
        parts = {
            "train": ~kept_back(where, HELD),
            "selection": judged_on(where, HELD, "selection", SELECTION),
            "gate": judged_on(where, HELD, "gate", SELECTION),
        }
        assert np.sum(list(parts.values()), axis=0).tolist() == [1] * len(x)
        for name, chosen in parts.items():
            for example in x[chosen]:
                assert seen.setdefault(example.tobytes(), name) == name
    shares = {name: list(seen.values()).count(name) / len(seen) for name in parts}
    assert shares["gate"] == pytest.approx(HELD * (1 - SELECTION), abs=0.05)
    assert shares["selection"] == pytest.approx(HELD * SELECTION, abs=0.05)


def test_a_client_with_more_examples_than_count_looks_at_those_that_stand_first(field):
    own, instructions = field.own(0), field.clients._instructions(None)
    all_of_it = judging(own, instructions, Survey(1, 1000, "gate", SELECTION))
    some = judging(own, instructions, Survey(1, 10, "gate", SELECTION))
    assert (len(all_of_it) > 10, len(some)) == (True, 10)
    assert {x.tobytes() for x in some.x} <= {x.tobytes() for x in all_of_it.x}
    last = places(some.x, 0).max()
    rest = [x for x in all_of_it.x if x.tobytes() not in {own.tobytes() for own in some.x}]
    assert last <= places(np.array(rest), 0).min()


@pytest.mark.slow
def test_students_learn_and_the_same_rounds_are_not_asked_twice(field):
    name = next(iter(field.world.task.students))
    student = field.world.task.students[name](field.world.dataset.spec)
    first = student.state_dict()["1.weight"].clone()
    one = field.clients.teach(student, field.config.compress.distil, model=f"student:{name}", seed=0)
    assert torch.equal(first, student.state_dict()["1.weight"])
    heard = len(field.said)
    again = field.clients.teach(student, field.config.compress.distil, model=f"student:{name}", seed=0)
    assert torch.equal(one.state_dict()["1.weight"], again.state_dict()["1.weight"])
    assert not torch.equal(one.state_dict()["1.weight"], first)
    assert "round 2/2: 5 clients" in field.said[heard - 1]


@pytest.mark.slow
def test_fewer_epochs_are_fewer_rounds_and_none_begins_after_the_deadline(tmp_path):
    field = Field(tmp_path, rounds=4)
    name, settings = next(iter(field.world.task.students)), field.config.compress.distil
    student = field.world.task.students[name](field.world.dataset.spec)
    half = replace(settings, epochs=settings.epochs // 2)
    field.clients.teach(student, half, model=f"student:{name}", seed=0)
    assert "round 2/2" in field.said[-1]
    with pytest.raises(TimeUpError, match="after round 1 of 4"):
        field.clients.teach(student, settings, model=f"student:{name}", seed=0, deadline=0.0)
    field.clients.teach(student, settings, model=f"student:{name}", seed=0)  # goes on where it was
    assert "round 4/4" in field.said[-1]


@pytest.mark.parametrize(
    ("changes", "model", "seed", "why"),
    [
        ({}, "", 0, "none of the task's"),
        ({"hint_weight": 1.0}, "student:x", 0, "hint_weight"),
        ({}, "student:x", 1, "would divide their examples anew"),
    ],
)
def test_what_clients_cannot_be_taught_by_says_why(field, changes, model, seed, why):
    with pytest.raises(CompressionError, match=why):
        field.clients.teach(
            torch.nn.Linear(2, 2), replace(field.config.compress.distil, **changes), model=model, seed=seed
        )


def lie(record, **arrays):
    """A reply with other arrays, of the same form or not."""

    def change(reply):
        if record in records_of(reply.content, ArrayRecord):
            put(reply.content, {record: to_record({k: np.asarray(v) for k, v in arrays.items()})})

    return change


TENS = np.full(10, 100, np.int64)
NONE = np.zeros(10, np.int64)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tamper", "why"),
    [
        (lie(COUNTS, n=TENS * 10**6, both=NONE, losses=TENS, wins=NONE), "8 to 1000 examples"),
        (lie(COUNTS, n=TENS, both=NONE, losses=TENS * 2, wins=NONE), "more than there are"),
        (lie(COUNTS, n=TENS, both=NONE, losses=-TENS, wins=NONE), "fewer than no example"),
        (lie(COUNTS, n=NONE, both=NONE, losses=NONE, wins=NONE), "8 to 1000 examples"),
        (lie(COUNTS, n=TENS[:3], both=NONE[:3], losses=NONE[:3], wins=NONE[:3]), "instead of int64"),
        (lie(COUNTS, n=TENS.astype(float), both=NONE, losses=NONE, wins=NONE), "float64"),
        (lie(COUNTS, n=TENS), "arrays"),
        (
            lambda reply: put(records_of(reply.content, MetricRecord)[METRICS], {"unusable": 10**9}),
            "unusable",
        ),
    ],
)
def test_counts_that_cannot_be_are_left_out_with_their_reason(tmp_path, variant, tamper, why):
    field = Field(tmp_path, tamper)
    found = field.clients.evidence(pack(variant), len(variant))
    assert found.clients == 4
    assert "1 clients are left out" in field.said[-1]
    assert why in field.said[-1]


@pytest.mark.slow
def test_a_lying_client_shifts_a_gate_by_no_more_than_its_own_share(tmp_path, field, variant):
    # Of 100 examples the worst that can be said is that all are losses.
    bad = lie(COUNTS, n=TENS // 10, both=NONE, losses=TENS // 10, wins=NONE)
    lying = Field(tmp_path, bad, max_examples=100).clients.evidence(pack(variant), len(variant)).counts
    honest = field.clients.evidence(pack(variant), len(variant)).counts
    assert int(lying.losses.sum()) <= int(honest.losses.sum()) + 100
    assert lying.examples <= honest.examples + 100


@pytest.mark.slow
@pytest.mark.parametrize("value", [1e30, -1e30])
def test_one_clients_absurd_ranges_leave_a_graph_as_good_as_it_was(tmp_path, field, variant, value):
    count = len(observe(watched(field.graph), field.own(0).x).lowest)
    same = np.full(count, value, np.float32)
    bad = Field(tmp_path, lie(RANGES, lowest=same, highest=same))
    spoilt = bad.clients.calibrate(field.graph)
    spec = field.world.dataset.spec
    own = field.own(0)
    answers = [score(pack(data), len(data), spec, own.x).argmax(1) for data in (variant, spoilt)]
    assert (answers[0] == answers[1]).mean() > 0.99


@pytest.mark.slow
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_ranges_that_are_no_numbers_are_left_out(tmp_path, field, value):
    count = len(observe(watched(field.graph), field.own(0).x).lowest)
    bad = Field(
        tmp_path, lie(RANGES, lowest=np.zeros(count, np.float32), highest=np.full(count, value, np.float32))
    )
    bad.clients.calibrate(field.graph)
    assert "NaN or infinite" in bad.said[-1]


def test_the_outermost_of_clients_ranges_are_not_believed():
    def of(low, high):
        return Ranges(np.array([low], np.float32), np.array([high], np.float32))

    parts = [of(-1, 1), of(-2, 2), of(-3, 3), of(-4, 4), of(-100, 1e20)]
    found = merged(parts, 0.1)
    assert (found.lowest[0], found.highest[0]) == (-4, 4)
    assert [left_out(n, 0.1) for n in (1, 2, 3, 19, 20, 39, 40)] == [0, 0, 1, 1, 2, 3, 4]
    assert left_out(20, 0.0) == 0
    assert merged(parts[:1], 0.1).highest[0] == 1
    # The middle one of three, whatever two of them would like.
    assert merged([of(5, 5), of(-9, -9), of(0, 1)], 0.4).lowest[0] == 0


@pytest.mark.slow
def test_clients_with_few_examples_tell_nothing(tmp_path, variant):
    field = Field(tmp_path, min_examples=10_000, max_examples=20_000)
    with pytest.raises(CompressionError, match="fewer than the 10000 of which to tell"):
        field.clients.evidence(pack(variant), len(variant))
    with pytest.raises(CompressionError, match="fewer than the 10000 of which to tell"):
        field.clients.calibrate(field.graph)


@pytest.mark.slow
def test_a_device_has_a_floor_of_its_own(tmp_path, variant):
    field = Field(tmp_path, min_examples=1, count=300)  # of about five examples each keeps back one or two
    with pytest.raises(CompressionError, match="fewer than the 4 of which to tell"):
        field.clients.evidence(pack(variant), len(variant))


def test_a_variant_that_answers_no_numbers_fails_where_two_clients_see_it(field, monkeypatch):
    good = Counts(TENS, TENS, NONE, NONE)
    told = [(good, 0), (good, 3), (good, 0)]
    monkeypatch.setattr(Clients, "_ask", lambda *_: told)
    assert field.clients.evidence(b"", 0).faults == ()
    told[2] = (good, 1)
    (fault,) = field.clients.evidence(b"", 0).faults
    assert "on 2 of 3 clients" in fault
