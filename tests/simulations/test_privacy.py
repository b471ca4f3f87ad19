"""Runs with a mechanism: what is spent is written first, adds up, survives kill -9, and ends the run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedge.config import Config
from fedge.errors import BudgetError, ConfigError
from fedge.learning.state import arrays_of, digest
from fedge_server.privacy.accounting import Spend, epsilon
from fedge_server.privacy.protection import Protection
from fedge_server.registry.database import Registry
from fedge_server.registry.ledger import Entry, Ledger

CENTRAL = {"mechanism": "central", "clip_norm": 0.5, "noise_multiplier": 1.0, "accountant": "rdp"}
BARE = {"standardise": False}
LINEAR = ("fedavg", "fedprox", "fedavgm", "fedadagrad", "fedadam", "fedyogi", "fedsgd")


def without_time(records):
    return [json.dumps({**record.to_json(), "seconds": 0}, sort_keys=True) for record in records]


def rows(home: Path, ledger: str = "default") -> list[Entry]:
    with Registry.open(home) as registry:
        return Ledger(registry.engine, ledger).entries()


@pytest.fixture
def private(small):
    """A small configuration with the central mechanism, further sections on top."""

    def make(**sections):
        sections["privacy"] = {**CENTRAL, **sections.get("privacy", {})}
        return small(**{"model": BARE, **sections})

    return make


@pytest.mark.quick_where(name=("fedavg",))
@pytest.mark.parametrize("name", LINEAR)
def test_every_linear_strategy_runs_and_resumes_bit_for_bit_with_one_row_a_round(
    name, private, learn, tmp_path
):
    config = private(
        strategy={"name": name},
        rounds={"count": 4},
        privacy={"adaptive_clip": True, "clip_count_sigma": 2.0},
    )
    whole = learn(config, tmp_path / "whole")
    with pytest.raises(Exception, match=r"^$"):
        learn(config, tmp_path / "cut", stop_after=2)
    resumed = learn(config, tmp_path / "cut")
    assert without_time(resumed.records) == without_time(whole.records)
    assert digest(arrays_of(resumed.model.network)) == digest(arrays_of(whole.model.network))
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    assert [row.round for row in rows(tmp_path / "whole")] == [1, 2, 3, 4]
    norms = [record.privacy["clip_norm"] for record in whole.records]
    assert norms[0] == 0.5
    assert len(set(norms)) == 4
    assert [r.privacy["next_clip_norm"] for r in whole.records[:-1]] == norms[1:]


def test_the_record_says_epsilon_delta_and_where_the_noise_came_from(private, learn, tmp_path):
    for number, record in enumerate(learn(private(), tmp_path).records, start=1):
        spent = [Spend("client", 1.0, 1.0)] * number
        assert record.privacy == {
            "epsilon": epsilon(spent, 1e-5, unit="client", accountant="rdp"),
            "delta": 1e-5,
            "clip_norm": 0.5,
            "noise": "seed",
        }
        assert record.train_loss is None  # it is exact, and no epsilon covers it


def test_the_summary_says_that_a_simulation_protects_nobody(private, tmp_path):
    from fedge_simulations import run

    result = run(private(rounds={"count": 1}))
    said = result.summary["privacy"]
    assert said == said | {
        "mechanism": "central",
        "epsilon": result.history[-1].privacy["epsilon"],
        "delta": 1e-5,
        "ledger": "default",
        "accountant": "rdp",
        "noise": "seed",
        "protects": False,
    }


@pytest.mark.slow
def test_what_is_recorded_of_the_updates_is_not_a_digest_of_what_clients_sent(
    private, small, learn, tmp_path
):
    plain = small(model=BARE, simulation={"engine": "sequential"})
    bare, noised = learn(plain, tmp_path / "a").records[0], learn(private(), tmp_path / "b").records[0]
    assert noised.updates != bare.updates


@pytest.mark.slow
def test_with_most_replies_missing_the_noise_is_the_same_and_so_is_epsilon(private, learn, tmp_path):
    """Clients that send no change: what the model moved by is the noise, over the clients expected."""

    def silent(message, reply):
        reply.content["arrays"] = message.content["arrays"]
        return reply

    def fails(*_):
        raise RuntimeError("out of battery")

    moved, spent = {}, {}
    for name, missing in (("all", ()), ("few", (1, 2, 3))):
        config = private(rounds={"count": 1}, model={**BARE, "name": "mlp"}, train={"epochs": 1})
        tamper = {node: fails if node in missing else silent for node in range(1, 6)}
        home = tmp_path / name
        learned = learn(config, home, tamper=tamper)
        assert learned.records[0].clients == 5 - len(missing)
        with Registry.open(home) as registry:
            after = registry.last_round("test").model
        start = learn_start(config)
        change = np.concatenate([(after[key] - start[key]).ravel() for key in start])
        moved[name], spent[name] = change.std() * 5, learned.records[0].privacy["epsilon"]
    assert moved["all"] == pytest.approx(0.5, rel=0.02)  # z S
    assert moved["few"] == pytest.approx(0.5, rel=0.02)
    assert spent["all"] == spent["few"]


def learn_start(config):
    from fedge_server.rounds.loop import _initialise
    from fedge_simulations.world import prepare

    world = prepare(config)
    return arrays_of(_initialise(world.task, config, world.server))


def test_other_updates_never_get_the_same_noise(private, learn, tmp_path):
    """Two rounds of the same seed and number whose difference would show the updates bare."""

    def louder(_, reply):
        record = reply.content.array_records["arrays"]
        reply.content["arrays"] = type(record)({k: type(v)(v.numpy() + 1) for k, v in record.items()})
        return reply

    config = private(rounds={"count": 1})
    for name, tamper in (("a", {1: lambda _, reply: reply}), ("b", {1: louder})):
        learn(config, tmp_path / name, tamper=tamper)
    one, other = rows(tmp_path / "a"), rows(tmp_path / "b")
    assert one[0].noise != other[0].noise


def test_a_run_stops_before_the_round_that_would_pass_the_budget(private, learn, tmp_path):
    three, four = (
        epsilon([Spend("client", 1.0, 1.0)] * n, 1e-5, unit="client", accountant="rdp") for n in (3, 4)
    )
    learned = learn(private(rounds={"count": 9}, privacy={"max_epsilon": (three + four) / 2}), tmp_path)
    assert len(learned.records) == len(rows(tmp_path)) == 3
    assert f"round 4 would bring epsilon to {four:.3f}" in learned.reason
    with Registry.open(tmp_path) as registry:
        assert registry.run("test")["status"] == "done"
        assert registry.last_round("test").model_sha256 == learned.model_sha256


@pytest.mark.slow
def test_a_second_run_on_the_same_ledger_goes_on_and_one_on_another_begins_anew(private, learn, tmp_path):
    with Registry.open(tmp_path) as registry:
        registry.begin_run("before", task="digits", seed=0, config={}, data="")
        for number in (1, 2):
            entry = Entry("before", number, f"n{number}", "central", Spend("client", 1.0, 1.0))
            Ledger(registry.engine, "default").spend(entry, lambda _: None)
    two, four = (
        epsilon([Spend("client", 1.0, 1.0)] * n, 1e-5, unit="client", accountant="rdp") for n in (2, 4)
    )
    limited = private(rounds={"count": 9}, privacy={"max_epsilon": four})
    learned = learn(limited, tmp_path)
    assert [record.round for record in learned.records] == [1, 2]
    assert learned.records[-1].privacy["epsilon"] == four
    full = private(privacy={"max_epsilon": two}, seed=3)
    with Registry.open(tmp_path) as registry:
        registry.set_status("test", "done")
    with pytest.raises(BudgetError, match="which holds 4 rounds"):
        learn_as("third", full, tmp_path)
    assert len(learn_as("fourth", private(privacy={"ledger": "ward-b"}), tmp_path).records) == 3


def learn_as(run_id, config, home):
    from fedge_simulations.simulate import learn
    from fedge_simulations.world import prepare

    return learn(prepare(config), home, run_id, lambda _: None)


def test_a_ledger_that_protected_examples_alone_promises_nothing_to_clients(private, learn, tmp_path):
    with Registry.open(tmp_path) as registry:
        registry.begin_run("before", task="digits", seed=0, config={}, data="")
        entry = Entry("before", 1, "n", "example", Spend("example", 0.1, 1.0, 10))
        Ledger(registry.engine, "default").spend(entry, lambda _: None)
    with pytest.raises(BudgetError, match="protect single examples alone"):
        learn(private(), tmp_path)


@pytest.mark.slow
def test_poisson_sampling_asks_each_client_by_itself_and_is_accounted_with_amplification(
    private, learn, tmp_path
):
    config = private(clients={"count": 40}, rounds={"count": 12, "sampling": "poisson", "fraction": 0.25})
    records = learn(config, tmp_path).records
    asked = [record.asked for record in records]
    assert len(set(asked)) > 3  # not a fixed number; 12 draws of a binomial with mean 10 and deviation 2.7
    assert 4 <= np.mean(asked) <= 16
    assert {row.spend.sampling for row in rows(tmp_path)} == {0.25}
    fixed = epsilon([Spend("client", 1.0, 1.0)] * 12, 1e-5, unit="client", accountant="rdp")
    assert records[-1].privacy["epsilon"] < fixed / 2


@pytest.mark.slow
def test_a_round_that_poisson_sampling_gives_to_nobody_does_not_count_and_costs_nothing(
    private, learn, tmp_path
):
    config = private(clients={"count": 5}, rounds={"count": 9, "sampling": "poisson", "fraction": 0.3})
    records = learn(config, tmp_path).records
    nobody = [record for record in records if record.asked == 0]
    assert nobody  # (.7)^5 = .17 of the rounds; this seed has some
    assert not any(record.counted for record in nobody)
    assert len(rows(tmp_path)) == len(records) - len(nobody)


ON_DEVICE = {
    "local": {"mechanism": "local", "clip_norm": 0.5, "noise_multiplier": 0.05},
    "example": {"mechanism": "example", "noise_multiplier": 0.5, "min_examples": 100},
}


@pytest.mark.quick_where(name=("fedavg",), engine=("vector",), mechanism=("local",))
@pytest.mark.parametrize("engine", ["vector", "sequential"])
@pytest.mark.parametrize("name", ["fedavg", "fedprox", "fedmedian"])
@pytest.mark.parametrize("mechanism", ON_DEVICE)
def test_devices_add_their_noise_and_a_resumed_run_is_the_same(
    mechanism, name, engine, private, learn, tmp_path
):
    config = private(
        privacy=ON_DEVICE[mechanism],
        strategy={"name": name, **({"proximal_mu": 0.1} if name == "fedprox" else {})},
        simulation={"engine": engine},
        rounds={"count": 3},
    )
    whole = learn(config, tmp_path / "whole")
    with pytest.raises(Exception, match=r"^$"):
        learn(config, tmp_path / "cut", stop_after=1)
    resumed = learn(config, tmp_path / "cut")
    assert without_time(resumed.records) == without_time(whole.records)
    assert digest(arrays_of(resumed.model.network)) == digest(arrays_of(whole.model.network))
    assert [row.round for row in rows(tmp_path / "cut")] == [1, 2, 3]
    assert [(r.clients, r.train_loss) for r in whole.records] == [(5, None)] * 3
    # local: any two updates, 2 S apart. example: 100 in batches of 32 are 4 steps, each with a quarter.
    spent = {
        "local": Spend("client", 1.0, 0.025),
        "example": Spend("example", 0.25, 0.5, 4),
    }[mechanism]
    assert {row.spend for row in rows(tmp_path / "whole")} == {spent}
    unit = spent.unit
    assert whole.records[-1].privacy["epsilon"] == epsilon([spent] * 3, 1e-5, unit=unit, accountant="rdp")


def test_what_a_device_sends_is_noised_weighs_one_and_tells_no_loss(private, learn, tmp_path):
    sent = []

    def look(message, reply):
        change = reply.content["arrays"]["1.weight"].numpy() - message.content["arrays"]["1.weight"].numpy()
        sent.append((change.std(), dict(reply.content["metrics"])))
        return reply

    noisy = {"mechanism": "local", "clip_norm": 0.5, "noise_multiplier": 2.0}
    config = private(privacy=noisy, rounds={"count": 1})
    learn(config, tmp_path, tamper=dict.fromkeys(range(1, 6), look))
    assert len(sent) == 5
    for deviation, metrics in sent:
        assert deviation == pytest.approx(1.0, rel=0.1)  # z S, over 640 values
        assert metrics == {"num-examples": 1, "train_loss": 0.0, "guarded": 1}


@pytest.mark.slow
def test_devices_with_too_few_examples_are_named_and_take_no_part(private, learn, tmp_path):
    few = {**ON_DEVICE["example"], "min_examples": 400}
    with pytest.raises(Exception, match=r"client error: DataError: data: .* 400 or more"):
        learn(private(privacy=few), tmp_path)


def test_a_round_that_devices_were_asked_for_is_spent_whether_it_counts_or_not(private, learn, tmp_path):
    def nan(_, reply):
        record = reply.content.array_records["arrays"]
        broken = {k: type(v)(np.full_like(v.numpy(), np.nan)) for k, v in record.items()}
        reply.content["arrays"] = type(record)(broken)
        return reply

    with pytest.raises(Exception, match="did not count"):
        learn(private(privacy=ON_DEVICE["local"]), tmp_path, tamper=dict.fromkeys(range(1, 6), nan))
    assert [row.round for row in rows(tmp_path)] == [1, 2, 3]


def test_what_cannot_hold_is_refused_before_anything_is_written(private, learn, small, tmp_path):
    with pytest.raises(ConfigError, match=r"model\.standardise"):
        learn(small(privacy=CENTRAL), tmp_path / "a")
    with pytest.raises(ConfigError, match="looks at single updates"):
        learn(private(strategy={"name": "fedmedian"}), tmp_path / "b")
    with pytest.raises(ConfigError, match=r"privacy.delta = 0.3: with 5 clients"):
        learn(private(privacy={"delta": 0.3}), tmp_path / "c")
    assert not (tmp_path / "a").exists()


KILLED_CONFIG = {
    "model": {"name": "logistic", "standardise": False},
    "clients": {"count": 3},
    "rounds": {"count": 3},
    "privacy": {"mechanism": "central", "accountant": "rdp"},
}

# A server process that is killed at a point of round 2: argv is home, where, and what noise comes from.
KILLED = """
import os, signal, sys
from pathlib import Path
from fedge.config import Config
from fedge_server.privacy import protection
from fedge_server.registry.database import Registry
from fedge_server.registry.ledger import Ledger
from fedge_simulations.simulate import learn
from fedge_simulations.world import prepare

home, where, secret = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "secret"
die = lambda: os.kill(os.getpid(), signal.SIGKILL)

if secret:  # as among devices: noise that no seed repeats
    of = protection.Protection.of
    def secretly(*arguments, **named):
        made = of(*arguments, **named)
        made.repeatable = False
        return made
    protection.Protection.of = secretly

def around(owner, name, number_of, before):
    honest = getattr(owner, name)
    def call(*arguments, **named):
        hit = number_of(*arguments, **named) == 2
        if hit and before:
            die()
        found = honest(*arguments, **named)
        if hit and not before:
            die()
        return found
    setattr(owner, name, call)

spends = lambda self, entry, check: entry.round
commits = lambda self, run_id, record, *rest: record.round
if where == "before the row": around(Ledger, "spend", spends, True)
if where == "after the row": around(Ledger, "spend", spends, False)
if where == "before the commit": around(Registry, "commit_round", commits, True)
if where == "after the commit": around(Registry, "commit_round", commits, False)
import json
learn(prepare(Config.from_mapping(json.loads(sys.argv[4]))), home, "run", lambda _: None)
"""
POINTS = ("before the row", "after the row", "before the commit", "after the commit")


def serve(home: Path, where: str, noise: str) -> int:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, "-c", KILLED, str(home), where, noise, json.dumps(KILLED_CONFIG)],
        env=environment,
        check=False,
    ).returncode


def go_on(home: Path, noise: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Do in this process what is left of the run: starting another would take most of the time."""
    of = Protection.of

    def secretly(*arguments, **named):
        made = of(*arguments, **named)
        made.repeatable = False
        return made

    if noise == "secret":
        monkeypatch.setattr(Protection, "of", secretly)
    learn_as("run", Config.from_mapping(KILLED_CONFIG), home)


@pytest.mark.slow
@pytest.mark.parametrize("noise", ["seed", "secret"])
@pytest.mark.parametrize("where", POINTS)
def test_kill_9_never_loses_a_count(where, noise, tmp_path, monkeypatch):
    assert serve(tmp_path, where, noise) == -signal.SIGKILL
    before = rows(tmp_path)
    assert len(before) == (1 if where == "before the row" else 2)
    go_on(tmp_path, noise, monkeypatch)
    after = rows(tmp_path)
    assert after[: len(before)] == before
    # Fresh noise on a round that had noise already is a second release of it; the same noise is not.
    again = noise == "secret" and where in ("after the row", "before the commit")
    assert [row.round for row in after] == ([1, 2, 2, 3] if again else [1, 2, 3])
    with Registry.open(tmp_path) as registry:
        last = registry.records("run")[-1]
    spent = [Spend("client", 1.0, 1.0)] * len(after)
    assert last.privacy["epsilon"] == epsilon(spent, 1e-5, unit="client", accountant="rdp")


@pytest.mark.slow
def test_the_command_shows_ledgers_and_runs_that_nothing_covers(private, small, learn, tmp_path, capsys):
    from fedge_server.cli import main

    learn_as("private", private(rounds={"count": 2}), tmp_path)
    learn_as("bare", small(rounds={"count": 1}), tmp_path)
    assert main(["privacy", "--home", str(tmp_path), "--accountant", "rdp", "--format", "json"]) == 0
    two = epsilon([Spend("client", 1.0, 1.0)] * 2, 1e-5, unit="client", accountant="rdp")
    spent = {"ledger": "default", "rounds": 2, "epsilon_client": two, "epsilon_example": two}
    assert json.loads(capsys.readouterr().out) == {
        "delta": 1e-5,
        "ledgers": [{**spent, "runs": ["private"]}],
        "without_mechanism": ["bare"],
    }
    assert main(["privacy", "--home", str(tmp_path), "--accountant", "rdp"]) == 0
    said = capsys.readouterr().out
    assert f"{two:.3f}" in said
    assert "covered by no epsilon, since they ran without a mechanism: bare" in said
    assert main(["privacy", "--home", str(tmp_path), "--delta", "2"]) == 2
