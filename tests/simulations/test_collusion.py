"""Attackers who agree on what they send, and those who teach a backdoor: by hand, and in whole rounds."""

from __future__ import annotations

import statistics

import numpy as np
import pytest

from fedge.dataset import Examples
from fedge.errors import ConfigError
from fedge.learning.messages import from_record
from fedge_server.strategies.robust import FedMedian
from fedge_simulations import run, scenario
from fedge_simulations.scenario.backdoor import brightest, poisoned, triggered
from fedge_simulations.scenario.collusion import agreed, most_deviations
from fedge_simulations.world import prepare


def of(*values):
    return [{"w": np.float32([value]), "steps": np.array([i])} for i, value in enumerate(values, 7)]


@pytest.mark.parametrize(
    ("attack", "expected"),
    [
        ("ipm:0.5", 0.0),  # the mean change of 2 and 4 from 1 is 2
        ("alie:1.5", 1.5),  # mean 3, deviation 1
        ("alie", 3.0),  # two of four are a majority with one supporter more: no deviation is hidden
        ("mimic", 2.0),
    ],
)
def test_what_attackers_agree_on(attack, expected):
    state = {"w": np.float32([1.0]), "steps": np.array([0])}
    found = agreed(of(2.0, 4.0), state, attack, asked=4)
    assert found["w"].tolist() == [expected]
    assert found["w"].dtype == np.float32
    assert found["steps"].tolist() == [7]


def test_of_a_gradient_a_change_counts_from_zero():
    assert agreed(of(2.0, 4.0), {}, "ipm:1", asked=4)["w"].tolist() == [-3.0]


def test_the_deviation_that_hides_is_that_of_the_paper():
    # 50 clients, 12 attack: 26 - 12 = 14 supporters, so 24 of 38 honest ones must be nearer.
    assert most_deviations(50, 12) == pytest.approx(statistics.NormalDist().inv_cdf(24 / 38))
    assert most_deviations(4, 4) == 0.0


def sent_in(config, learn, home, monkeypatch, **options):
    """By client, what the first round's strategy got."""
    got = {}
    plain = FedMedian.aggregate_train

    def spy(self, number, replies):
        for reply in replies:
            got[reply.metadata.src_node_id] = {
                name: value.copy() for name, value in from_record(reply.content["arrays"]).items()
            }
        return plain(self, number, replies)

    monkeypatch.setattr(FedMedian, "aggregate_train", spy)
    learn(config, home, **options)
    return got


TEN = {"clients": {"count": 10}, "rounds": {"count": 1}, "strategy": {"name": "fedmedian"}}


@pytest.mark.quick_where(attack=("mimic",))
@pytest.mark.parametrize("attack", ["ipm:0.5", "alie:1.5", "mimic"])
def test_a_ring_sends_one_update_made_of_its_own_honest_ones(attack, small, learn, tmp_path, monkeypatch):
    honest = sent_in(small(**TEN), learn, tmp_path / "honest", monkeypatch)
    attackers = {"attackers": 0.4, "attacks": [attack]}
    config = small(**TEN, scenario=attackers)
    ring = [node for node in range(1, 11) if prepare(config).course(None).fate(
        node, kind="train", round=1, clock_s=0, examples=1, bytes_down=0, bytes_up=0
    ).attack]  # fmt: skip
    assert len(ring) > 1
    got = sent_in(config, learn, tmp_path / "ring", monkeypatch)
    one_by_one = small(**TEN, scenario=attackers, simulation={"engine": "sequential"})
    alone = sent_in(one_by_one, learn, tmp_path / "alone", monkeypatch)
    own = [honest[node] for node in ring]
    for name in honest[1]:
        values = np.stack([answer[name] for answer in own]).astype(np.float64)
        for node in range(1, 11):
            if node not in ring:
                np.testing.assert_array_equal(got[node][name], honest[node][name])
                continue
            np.testing.assert_array_equal(got[node][name], got[ring[0]][name])
            np.testing.assert_allclose(got[node][name], alone[node][name], atol=1e-5)
            if attack == "alie:1.5":
                expected = values.mean(axis=0) - 1.5 * values.std(axis=0)
                np.testing.assert_allclose(got[node][name], expected, atol=1e-6)
            if attack == "mimic":
                np.testing.assert_array_equal(got[node][name], own[0][name])


@pytest.mark.slow
def test_a_ring_counts_those_whose_answers_come_too_late(small, learn, tmp_path, monkeypatch):
    seen = []
    plain = scenario.agreed
    monkeypatch.setattr(
        scenario,
        "agreed",
        lambda answers, *rest: seen.append((len(answers), rest[-1])) or plain(answers, *rest),
    )
    hostile = {"attackers": 0.99, "attacks": ["ipm:1"], "speed_sigma": 1.0}
    config = small(clients={"count": 10}, rounds={"count": 2, "quorum": 0.3}, scenario=hostile)
    learned = learn(config, tmp_path)
    assert [record.clients for record in learned.records] == [3, 3]
    assert seen == [(10, 10), (10, 10)]


def test_a_backdoor_is_a_pixel_and_a_label_on_every_second_example():
    own = Examples(np.zeros((3, 2, 2), np.uint8), np.array([4, 5, 6]))
    found = poisoned(own, 1, brightest(own.x))
    assert found.y.tolist() == [1, 5, 1]
    assert found.x[:, 1, 1].tolist() == [255, 0, 255]
    assert found.x.sum() == 510
    assert own.x.sum() == 0
    colours = triggered(np.zeros((1, 2, 2, 3)), 0.5)
    assert colours[0, 1, 1].tolist() == [0.5] * 3
    assert colours.sum() == 1.5
    assert brightest(np.array([0.25, np.nan, 2.0])) == 2.0


@pytest.mark.slow
def test_a_run_says_how_often_a_backdoor_opens(small):
    sections = {"clients": {"count": 6}, "rounds": {"count": 8}, "model": {"name": "mlp"}}
    hostile = {"scenario": {"attackers": 0.99, "attacks": ["backdoor:3"]}}
    taught = run(small(**sections, **hostile)).summary["backdoors"]
    assert [each["class"] for each in taught] == [3]
    assert taught[0]["success"] > 0.9
    assert taught[0]["without_trigger"] < 0.2
    assert "backdoors" not in run(small(**sections)).summary


@pytest.mark.parametrize("attack", ["ipm", "ipm:x", "alie:-1", "backdoor", "backdoor:-1", "mimic:2"])
def test_attacks_that_do_not_exist_are_refused(attack, small):
    with pytest.raises(ConfigError, match=r"scenario\.attacks"):
        small(scenario={"attacks": [attack]})


def test_a_backdoor_needs_images_and_a_class_that_there_is(small):
    with pytest.raises(ConfigError, match=r"backdoor:10.*from 0 to 9"):
        prepare(small(scenario={"attackers": 0.5, "attacks": ["backdoor:10"]}))
    prepare(small(scenario={"attacks": ["backdoor:10"]}))  # nobody attacks
