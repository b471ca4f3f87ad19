"""What befalls simulated clients: worked by hand, drawn by the seed, recorded and replayed."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest

from fedge.config import Config
from fedge.dataset import Examples
from fedge.errors import ConfigError, DataError, RoundError
from fedge_simulations.course import Fate
from fedge_simulations.scenario import EVENTS, Scenario, attacked, drift
from fedge_simulations.scenario.draws import log_normal, uniform
from fedge_simulations.scenario.events import Recorder, Recording, Sending

LABELS = np.arange(40) % 4
MANY = np.arange(1, 20_001)


def scenario(folder=None, clients=20_000, seed=0, **settings) -> Scenario:
    config = Config.from_mapping({"seed": seed, "scenario": settings})
    return Scenario(config, clients=clients, labels=LABELS, folder=folder)


def ask(course: Scenario, nodes, *, kind="train", number=1, clock_s=0.0, examples=50, down=0, up=0, passes=2):
    return course.fates(
        list(nodes),
        kind=kind,
        round=number,
        clock_s=clock_s,
        examples=[examples] * len(nodes),
        bytes_down=down,
        bytes_up=up,
        passes=passes,
    )


def test_work_and_both_ways_add_up():
    # 50 examples, 2 passes of 0.01 s: 1 s. 8,000 bytes down at 4,000 a second, 6,000 up at 1,000.
    course = scenario(
        seconds_per_example=0.01, down_bytes_per_s=4000.0, up_bytes_per_s=1000.0, latency_s=0.25
    )
    assert ask(course, [7], down=8000, up=6000) == [Fate(1.0 + 2.0 + 6.0 + 0.5)]
    (look,) = ask(course, [7], kind="evaluate", down=8000)  # a third of one pass, and nothing to send
    assert look.arrives_s == pytest.approx(0.5 / 3 + 2.0 + 0.5)


@pytest.mark.parametrize("key", ["speed_sigma", "bandwidth_sigma", "latency_sigma"])
def test_clients_differ_log_normally_around_the_stated_median(key):
    pace = {"latency_s": 1.0} if key == "latency_sigma" else {"down_bytes_per_s": 1000.0}
    course = scenario(**{key: 0.5, "seconds_per_example": 1e-9 if key != "speed_sigma" else 0.01}, **pace)
    size = 1000 if key == "bandwidth_sigma" else 0
    took = np.array([fate.arrives_s for fate in ask(course, MANY, down=size)])
    both_ways = 2.0 if key == "latency_sigma" else 1.0
    assert np.median(took) == pytest.approx(both_ways, rel=0.02)
    assert np.log(took).std() == pytest.approx(0.5, rel=0.02)


@pytest.mark.slow
def test_a_share_of_the_answers_takes_longer_and_another_share_each_round():
    course = scenario(stragglers=0.3, straggler_factor=10.0, seconds_per_example=0.01)
    first, second = ([fate.arrives_s for fate in ask(course, MANY, number=number)] for number in (1, 2))
    assert set(first) == {1.0, 10.0}
    assert first.count(10.0) / len(MANY) == pytest.approx(0.3, abs=0.01)
    assert first != second


@pytest.mark.slow
def test_a_share_of_the_answers_is_lost_somewhere_on_the_way():
    fates = ask(scenario(dropouts=0.2, seconds_per_example=0.01), MANY)
    lost = [fate for fate in fates if fate.lost]
    assert len(lost) / len(MANY) == pytest.approx(0.2, abs=0.01)
    assert {fate.lost for fate in lost} == {"dropped out"}
    assert np.mean([fate.arrives_s for fate in lost]) == pytest.approx(0.5, abs=0.02)
    assert {fate.arrives_s for fate in fates if not fate.lost} == {1.0}


RICH = {
    "speed_sigma": 1.0,
    "bandwidth_sigma": 1.0,
    "up_bytes_per_s": 10.0,
    "stragglers": 0.2,
    "dropouts": 0.2,
    "attackers": 0.3,
    "attacks": ["nan", "scale:3"],
    "online_share": 0.5,
    "late_share": 0.2,
    "late_from_s": 10.0,
    "late_over_s": 1000.0,
}


def test_a_fate_is_the_same_whatever_the_order_and_the_company():
    together = ask(scenario(**RICH), range(1, 101), up=30)
    backwards = ask(scenario(**RICH), range(100, 0, -1), up=30)
    assert together == backwards[::-1]
    course = scenario(**RICH)
    alone = [
        course.fate(
            node, kind="train", round=1, clock_s=0.0, examples=50, bytes_down=0, bytes_up=30, passes=2
        )
        for node in (50, 3, 99)
    ]
    assert alone == [together[49], together[2], together[98]]
    assert together != ask(scenario(seed=1, **RICH), range(1, 101), up=30)


def test_the_numbers_of_a_client_do_not_depend_on_the_platform_or_the_version():
    """A change here changes every recorded experiment."""
    nodes = np.array([1, 10**6])
    assert uniform(nodes, 0, 1).tolist() == [0.19231829513312926, 0.14566677613647616]
    expected = [0.9913667065749416, 0.714689463898044]
    assert log_normal(nodes, 1.0, 0, 1).tolist() == pytest.approx(expected, rel=1e-12)


def test_a_cohort_of_a_million_costs_what_a_cohort_of_a_thousand_costs():
    def seconds(population: int) -> float:
        course, step = scenario(clients=population, **RICH), population // 1000
        nodes, best = range(1, population + 1, step), float("inf")
        for _ in range(5):
            started = time.perf_counter()
            ask(course, nodes)
            best = min(best, time.perf_counter() - started)
        return best

    assert seconds(1_000_000) < 3 * seconds(1000)


def test_a_window_goes_on_after_midnight():
    # All windows begin within the day; with half of a day of 100 s online, about half are there at any time.
    course = scenario(day_s=100.0, online_share=0.5, clients=1000)
    nodes = range(1, 1001)
    by_time = {clock: set(course.online(nodes, clock)) for clock in (0.0, 25.0, 75.0, 100.0, 125.0)}
    assert by_time[0.0] == by_time[100.0]
    assert by_time[25.0] == by_time[125.0]
    assert all(420 < len(found) < 580 for found in by_time.values())
    assert by_time[25.0].isdisjoint(by_time[75.0])
    assert by_time[25.0] | by_time[75.0] == set(nodes)
    over_midnight = by_time[75.0] & by_time[100.0]
    assert over_midnight  # there before it and after it
    assert over_midnight <= set(course.online(nodes, 99.999))


def test_without_spread_all_are_there_at_the_beginning_of_the_day():
    course = scenario(day_s=100.0, online_share=0.25, online_spread=0.0, seconds_per_example=0.01)
    assert course.online([1, 2, 3], 124.9) == [1, 2, 3]
    assert course.online([1, 2, 3], 125.0) == []
    # The work takes 1 s, the window ends after 0.5 s.
    assert ask(course, [1], clock_s=124.5) == [Fate(0.5, "went offline")]
    assert ask(course, [1], clock_s=124.0) == [Fate(1.0)]
    assert ask(course, [1], clock_s=150.0) == [Fate(0.0, "went offline")]


def test_who_joins_late_is_not_there_before():
    course = scenario(late_share=0.25, late_from_s=100.0, late_over_s=50.0)
    there = [len(course.online(MANY, clock)) / len(MANY) for clock in (0.0, 99.0, 125.0, 150.0)]
    assert there == pytest.approx([0.75, 0.75, 0.875, 1.0], abs=0.01)
    assert there[0] == there[1]
    assert there[3] == 1


def test_a_battery_drains_by_work_of_earlier_rounds_and_recharges_by_the_clock():
    # 1 s of work of 4 s that a battery lasts: a quarter. It recharges in 100 s.
    course = scenario(
        battery_s=4.0, recharge_s=100.0, battery_min=0.5, seconds_per_example=0.01, clients=9, record=True
    )
    course.begin_round(1)
    (node,) = course.online(range(1, 10), 0.0)[:1]
    full_at = 100.0  # whatever it began with
    assert course.online([node], full_at) == [node]
    assert ask(course, [node], clock_s=full_at) == [Fate(1.0)]
    assert ask(course, [node], clock_s=full_at) == [Fate(1.0)]  # the same round: nothing has been drained yet
    course.begin_round(2)  # 0.5 left at 101 s
    assert course.online([node], 101.0) == [node]
    ask(course, [node], number=2, clock_s=101.0)
    course.begin_round(3)  # 0.25 left at 102 s
    assert course.online([node], 102.0) == []
    assert course.online([node], 102.0 + 24.0) == []
    assert course.online([node], 102.0 + 25.0) == [node]
    # 2 s of work with a quarter of 4 s left: empty after 1 s.
    assert ask(course, [node], number=3, clock_s=102.0, examples=100) == [Fate(1.0, "battery empty")]


@pytest.mark.parametrize(
    ("attack", "expected"),
    [
        ("sign_flip", [0.0, 3.0]),
        ("scale:10", [11.0, -8.0]),
        ("scale:-0.5", [0.5, 2.5]),
        ("free_rider", [1.0, 2.0]),
        ("label_flip", [2.0, 1.0]),
    ],
)
def test_an_attack_changes_the_update(attack, expected):
    state = {"w": np.float32([1, 2])}
    sent = attacked({"w": np.float32([2, 1])}, state, attack, 0)
    assert sent["w"].tolist() == expected
    assert sent["w"].dtype == np.float32
    assert state["w"].tolist() == [1, 2]


def test_an_attack_on_a_gradient_counts_from_zero_and_leaves_whole_numbers_alone():
    arrays = {"w": np.float32([2, 1]), "steps": np.int64([5])}
    assert attacked(arrays, {}, "sign_flip", 0)["w"].tolist() == [-2, -1]
    assert attacked(arrays, {}, "free_rider", 0)["w"].tolist() == [0, 0]
    assert attacked(arrays, {}, "nan", 0)["steps"].tolist() == [5]


def test_nan_and_noise():
    honest = {"w": np.zeros(10_000, np.float32)}
    assert np.isnan(attacked(honest, honest, "nan", 0)["w"]).all()
    noisy = attacked(honest, honest, "noise:0.5", 3)["w"]
    assert noisy.std() == pytest.approx(0.5, rel=0.05)
    assert (noisy == attacked(honest, honest, "noise:0.5", 3)["w"]).all()
    assert (noisy != attacked(honest, honest, "noise:0.5", 4)["w"]).any()


@pytest.mark.slow
def test_a_share_of_the_clients_attacks_always_and_only_in_training():
    course = scenario(attackers=0.3, attacks=["nan", "label_flip"])
    kinds = [fate.attack for fate in ask(course, MANY)]
    assert kinds == [fate.attack for fate in ask(course, MANY, number=2)]
    assert kinds.count("") / len(kinds) == pytest.approx(0.7, abs=0.01)
    assert kinds.count("nan") / len(kinds) == pytest.approx(0.15, abs=0.01)
    assert not any(fate.attack for fate in ask(course, MANY, kind="evaluate"))
    assert course.attacks
    assert not scenario().attacks
    own = Examples(np.zeros((3, 1)), np.array([0, 1, 3]))
    flips, honest = kinds.index("label_flip") + 1, kinds.index("") + 1
    assert course.believed(flips, own, 4, round=1).y.tolist() == [3, 2, 0]
    assert course.believed(honest, own, 4, round=1) is own


TWENTY = np.arange(5, 25)


def part(own=TWENTY, *, clock_s, node=1, seed=0, **settings):
    return scenario(seed=seed, **settings).examples(node, own, round=1, clock_s=clock_s)


def test_growing_data_grows_to_all_and_loses_nothing():
    settings = {"data": "growing", "data_share": 0.25, "data_over_s": 100.0}
    held = [part(clock_s=clock, **settings) for clock in (0.0, 50.0, 100.0, 900.0)]
    # A quarter of 20, then 0.25 + 0.75 / 2 of them rounded up, then all.
    assert [len(each) for each in held] == [5, 13, 20, 20]
    assert set(held[0]) < set(held[1]) < set(held[2])
    assert set(held[0]) != set(part(clock_s=0.0, node=2, **settings))
    # Less data is less work: 5 of 20 examples.
    course = scenario(seconds_per_example=0.1, **settings)
    assert ask(course, [1], examples=20, passes=1) == [Fate(0.5)]


def test_moving_data_goes_through_the_classes_and_comes_back():
    settings = {"data": "moving", "data_share": 0.25, "data_over_s": 100.0}
    own = np.arange(40)  # ten of each of four classes
    shares = []
    for clock in (0.0, 25.0, 50.0, 75.0, 100.0):
        now = part(own, clock_s=clock, **settings)
        assert len(now) == 10
        shares.append(np.bincount(LABELS[now], minlength=4))
    assert shares[0].tolist() == shares[4].tolist()
    assert sum(shares[:4]).tolist() == [10, 10, 10, 10]  # a quarter of the way is a quarter of the data
    assert all(np.count_nonzero(share) <= 2 for share in shares)


def test_a_client_holds_one_example_at_least():
    config = Config.from_mapping({"scenario": {"data": "growing", "data_share": 0.01}})
    assert drift.held(config.scenario, np.array([0, 1, 3, 1000]), 0.0).tolist() == [0, 1, 1, 10]


def lines(folder):
    return [json.loads(line) for line in (folder / EVENTS).read_text().splitlines()]


def test_every_sending_is_written_down(tmp_path):
    course = scenario(tmp_path, clients=9, seconds_per_example=0.01)
    course.begin_round(0)
    ask(course, [3, 1], number=1, clock_s=4.5)
    assert lines(tmp_path) == [
        {"fedge-events": 1, "clients": 9, "seed": 0},
        {"round": 1, "kind": "train", "clock_s": 4.5, "client": [3, 1], "arrives_s": [1.0, 1.0]},
    ]


def test_a_recording_gives_the_same_fates_to_another_scenario(tmp_path):
    recorded = scenario(tmp_path, clients=100, **RICH)
    recorded.begin_round(0)
    fates = ask(recorded, range(1, 101), up=30, clock_s=500.0)
    assert {fate.lost for fate in fates} >= {"", "dropped out", "went offline"}
    replayed = scenario(clients=100, replay=str(tmp_path / EVENTS), seconds_per_example=9.0)
    assert ask(replayed, range(1, 101)) == fates
    assert ask(replayed, [5, 2]) == [fates[4], fates[1]]
    assert replayed.attacks


def test_a_recording_says_who_trains_with_wrong_labels(tmp_path):
    recorded = scenario(tmp_path, clients=100, attackers=0.5, attacks=["label_flip"])
    recorded.begin_round(0)
    kinds = [fate.attack for fate in ask(recorded, range(1, 101))]
    replayed = scenario(clients=100, replay=str(tmp_path / EVENTS))
    own = Examples(np.zeros((2, 1)), np.array([0, 3]))
    for node, kind in enumerate(kinds, start=1):
        assert replayed.believed(node, own, 4, round=1).y.tolist() == ([3, 0] if kind else [0, 3])


def test_what_a_recording_does_not_have_is_named(tmp_path):
    recorded = scenario(tmp_path, clients=9)
    recorded.begin_round(0)
    ask(recorded, [1, 2])
    path = str(tmp_path / EVENTS)
    with pytest.raises(
        DataError, match=r"is of 9 clients, this run has 8; use the recording's clients.count"
    ):
        scenario(clients=8, replay=path)
    with pytest.raises(RoundError, match=r"client 3, train in round 1 is not in .* ends with round 1"):
        ask(scenario(clients=9, replay=path), [1, 3])
    with pytest.raises(RoundError, match="train in round 2 is not in"):
        ask(scenario(clients=9, replay=path), [1], number=2)
    with pytest.raises(DataError, match="cannot be read"):
        scenario(clients=9, replay=str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="recorded without batteries"):
        scenario(clients=9, replay=path, battery_s=1.0)


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"[]",
        b'{"round":1,"kind":"train","clock_s":0,"client":[1,1],"arrives_s":[0,0]}',
        b'{"round":1,"kind":"train","clock_s":0,"client":[1],"arrives_s":[]}',
        b'{"round":1,"kind":"train","clock_s":0,"client":[1],"arrives_s":[-1]}',
        b'{"round":1,"kind":"train","clock_s":0,"client":[1],"arrives_s":[NaN]}',
        b'{"round":1,"kind":"train","clock_s":0,"client":[10],"arrives_s":[0]}',
        b'{"round":1,"kind":"train","clock_s":0,"client":[1],"arrives_s":[0],"lost":{"2":"x"}}',
        b'{"round":1,"kind":"train","clock_s":0,"client":[1],"arrives_s":[0],"attack":{"1":"rm"}}',
        b'{"round":1,"kind":"train","clock_s":0,"client":[1],"arrives_s":[0],"work_s":[]}',
        b'{"round":true,"kind":"train","clock_s":0,"client":[],"arrives_s":[]}',
    ],
)
def test_a_malformed_recording_is_refused_with_its_line(line, tmp_path):
    path = tmp_path / EVENTS
    path.write_bytes(b'{"fedge-events": 1, "clients": 9, "seed": 0}\n' + line + b"\n")
    with pytest.raises(DataError, match="line 2"):
        Recording(path, clients=9)


@pytest.mark.parametrize("first", [b"", b"{}\n", b"[1]\n", b'{"fedge-events": 2, "clients": 9}\n'])
def test_what_is_no_recording_is_refused(first, tmp_path):
    path = tmp_path / EVENTS
    path.write_bytes(first)
    with pytest.raises(DataError, match=r"is no recording|has version 2"):
        Recording(path, clients=9)


def test_rounds_that_were_not_committed_and_what_a_crash_left_are_cut_off(tmp_path):
    recorder = Recorder(tmp_path / EVENTS, clients=9, seed=0)
    assert recorder.resume(0) == []
    sent = [Sending(number, "train", 0.5, [1], [Fate(0.1 + number)], None) for number in (0, 1, 2)]
    for each in sent:
        recorder.append(each)
    with (tmp_path / EVENTS).open("ab") as file:
        file.write(b'{"round": 2, "ki')
    assert recorder.resume(2) == sent[:2]
    assert [line.get("round") for line in lines(tmp_path)] == [None, 0, 1]
    other = Recorder(tmp_path / EVENTS, clients=8, seed=0)
    assert other.resume(2) == []
    assert len(lines(tmp_path)) == 1


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(ConfigError, match="batteries need the record"):
        scenario(battery_s=1.0, record=False)
    with pytest.raises(ConfigError, match=r"name what scenario.attackers do"):
        scenario(attackers=0.1, attacks=[])
    with pytest.raises(ConfigError, match=r"scenario.attacks.0 = 'rm': must be one of 'sign_flip'"):
        scenario(attacks=["rm"])


BUSY = {
    "seconds_per_example": 0.1,
    "speed_sigma": 0.5,
    "dropouts": 0.2,
    "battery_s": 120.0,
    "recharge_s": 400.0,
    "day_s": 200.0,
    "online_share": 0.6,
    "attackers": 0.6,
    "attacks": ["scale:2", "label_flip", "ipm:0.5", "alie", "mimic", "backdoor:3"],
    "data": "growing",
    "data_over_s": 300.0,
    "pause_s": 10.0,
}


def without_time(records):
    return [json.dumps({**record.to_json(), "seconds": 0}, sort_keys=True) for record in records]


@pytest.mark.slow
def test_a_run_under_a_scenario_resumes_bit_for_bit_and_replays_to_the_same_model(small, learn, tmp_path):
    sections = {"clients": {"count": 12}, "rounds": {"count": 5, "cohort": 6, "deadline_s": 60.0}}
    config = small(scenario=BUSY, **sections)
    whole = learn(config, tmp_path / "whole")
    with pytest.raises(Exception, match=r"^$"):
        learn(config, tmp_path / "cut", stop_after=2)
    resumed = learn(config, tmp_path / "cut")
    assert without_time(resumed.records) == without_time(whole.records)
    recorded = (tmp_path / "whole" / EVENTS).read_bytes()
    assert (tmp_path / "cut" / EVENTS).read_bytes() == recorded
    assert any(record.rejected for record in whole.records)
    # Whatever else the scenario draws, the recording decides.
    again = small(
        scenario={**BUSY, "dropouts": 0.9, "attackers": 0.0, "replay": str(tmp_path / "whole" / EVENTS)},
        **sections,
    )
    replayed = learn(again, tmp_path / "again")
    assert without_time(replayed.records) == without_time(whole.records)
    assert replayed.model_sha256 == whole.model_sha256


@pytest.mark.slow
def test_an_attack_reaches_the_model(small, learn, tmp_path):
    honest = learn(small(rounds={"count": 1}), tmp_path / "honest").records[0]
    config = small(rounds={"count": 1}, scenario={"attackers": 0.99, "attacks": ["nan"]})
    with pytest.raises(RoundError, match=r"did not count|no round counted"):
        learn(config, tmp_path / "nan")
    flipped = learn(small(rounds={"count": 1}, scenario={"attackers": 0.99}), tmp_path / "flip").records[0]
    labels = {"attackers": 0.99, "attacks": ["label_flip"]}
    wrong = learn(small(rounds={"count": 1}, scenario=labels), tmp_path / "labels").records[0]
    assert honest.metrics["accuracy"] > 0.5
    assert flipped.metrics["accuracy"] < 0.2
    assert wrong.metrics["accuracy"] < 0.2
