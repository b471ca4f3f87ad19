"""What is kept, on SQLite and PostgreSQL: whatever may still be asked for is whole, at every moment."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from fedge.errors import FedgeError, UserError
from fedge.files import sha256
from fedge_server.hub.home import Home
from fedge_server.registry import schema, store
from fedge_server.registry.database import Registry
from fedge_server.registry.engine import reading, writing
from fedge_server.registry.living import Retired, living
from fedge_server.retention import forgetting, pruning
from fedge_server.retention.facts import facts
from fedge_server.retention.pruning import Pruned, prune
from fedge_server.retention.rule import Facts, Keep, retire
from fedge_server.rollout.audit import Audit
from fedge_server.rounds.record import RoundRecord

NOW = 1_800_000_000.0
DAY = 86_400.0

# The rule

_versions = st.integers(1, 9)
_variants = st.frozensets(st.tuples(_versions, st.sampled_from(["micro", "board"])), max_size=12)
_runs = st.lists(st.sampled_from("abcdef"), unique=True, max_size=6).map(tuple)
_facts = st.builds(
    Facts,
    variants=_variants,
    rolling=_variants,
    running=_variants,
    named=st.frozensets(_versions, max_size=2),
    refused=st.lists(
        st.tuples(st.sampled_from("uvwxyz"), st.sampled_from(["micro", "board"])), unique=True, max_size=6
    ).map(tuple),
    over=_runs,
    busy=st.frozensets(st.sampled_from("abcdef"), max_size=3),
)


@given(_facts, st.builds(Keep, releases=st.integers(1, 4), runs=st.integers(1, 4)))
def test_what_goes_is_neither_new_nor_asked_for_and_all_else_that_is_old_goes(
    found: Facts, keep: Keep
) -> None:
    gone = retire(found, keep)
    for version, tier in found.variants:
        newer = [v for v, t in found.variants if t == tier and v > version]
        asked = (version, tier) in found.rolling | found.running or version in found.named
        assert ((version, tier) in gone.variants) == (len(newer) >= keep.releases and not asked)
    for place, (draft, tier) in enumerate(found.refused):
        newer = [each for each, t in found.refused[:place] if t == tier]
        assert ((draft, tier) in gone.drafts) == (len(newer) >= keep.releases)
    for place, run in enumerate(found.over):
        assert (run in gone.runs) == (place >= keep.runs and run not in found.busy)
    left = Facts(
        found.variants - gone.variants, found.rolling, found.running, found.named,
        tuple(each for each in found.refused if each not in gone.drafts),
        tuple(run for run in found.over if run not in gone.runs), found.busy,
    )  # fmt: skip
    again = retire(left, keep)
    assert not again.variants
    assert not again.drafts


def test_nothing_is_kept_by_a_number_below_one() -> None:
    for wrong in ({"releases": 0}, {"runs": -1}, {"unseen_s": 0.0}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            Keep(**wrong)


# A registry with releases


@pytest.fixture
def home(tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> Home:
    registry.begin_run("r", task="digits", seed=0, config={}, data="d")
    monkeypatch.setattr(pruning, "PAUSE_S", 0.0)
    monkeypatch.setattr(pruning, "PATIENCE_S", 0.0)
    return Home(tmp_path)


def commit(registry: Registry, number: int, run: str = "r") -> str:
    model = {"w": np.full(3, number, np.float32)}
    return registry.commit_round(run, RoundRecord(number, {"accuracy": 0.5}), model, b"the same state")


def release(registry: Registry, version: int, *tiers: str, content: int | None = None) -> dict[str, str]:
    """A release whose objects are in the store; `content` is the version whose bytes it has."""
    of = version if content is None else content
    put = registry.store.put
    kinds = ("wire", "evidence", "golden", "reference")
    with registry.store.adding():
        model = put(b"model %d" % of)
        variants = [
            {"tier": tier, "recipe": "int8", "installed": f"installed {of}"}
            | {kind: put(f"{kind} {of} {tier}".encode()) for kind in kinds}
            for tier in tiers
        ]
        registry.record_release(
            version=version, run_id="r", round_number=1, global_model=model,
            manifest=b"manifest %d" % version, variants=variants,
        )  # fmt: skip
    return {"model": model} | {f"{kind} {each['tier']}": each[kind] for each in variants for kind in kinds}


def pruned(home: Home, registry: Registry, keep: Keep | None = None, *, dry: bool = False) -> Pruned:
    return prune(home, registry, keep or Keep(releases=2), now=NOW, dry=dry, grace_s=-1e12)


def there(registry: Registry, objects: dict[str, str]) -> set[str]:
    return {name for name, digest in objects.items() if registry.store.has(digest)}


def check_whole(registry: Registry) -> None:
    """Every object that the rows name is there, with its own bytes."""
    with reading(registry.engine) as connection:
        for digest in living(connection, rounds=2):
            registry.store.get(digest)


def test_bytes_of_old_releases_go_and_what_lineage_is_read_from_stays(home: Home, registry: Registry) -> None:
    found = [release(registry, version, "micro") for version in (1, 2, 3)]
    found.append(release(registry, 4, "micro", content=1))  # as a way back
    before = registry.releases()
    dry = pruned(home, registry, dry=True)
    assert there(registry, found[1]) == set(found[1])
    done = pruned(home, registry)
    assert done == dry == Pruned(Retired(frozenset({(1, "micro"), (2, "micro")})), 4, done.size)
    assert there(registry, found[1]) == {"evidence micro"}
    for whole in (found[0], found[2], found[3]):  # the first lies there as the fourth
        assert there(registry, whole) == set(whole)
    assert registry.releases() == before
    assert all(registry.store.has(row["manifest"]) for row in before)
    assert [e.subject for e in Audit(registry.engine).entries()] == ["release 1", "release 2"]
    assert pruned(home, registry) == Pruned(Retired(), 0, 0)
    assert not pruned(home, registry, Keep(releases=9)).retired  # a larger number brings nothing back
    check_whole(registry)


def test_tiers_are_counted_by_themselves_and_the_model_stays_as_long_as_one_is_kept(
    home: Home, registry: Registry
) -> None:
    both = release(registry, 1, "micro", "board")
    for version in (2, 3):
        release(registry, version, "micro")
    pruned(home, registry)
    kept = {"model", "wire board", "golden board", "reference board", "evidence board", "evidence micro"}
    assert there(registry, both) == kept


def _device(connection: sa.Connection, seen: float = NOW, name: str = "ann", number: int = 0) -> None:
    zero = {"node_id": number, "public_key": "", "sealing_key": "", "reason": "", "wire_version": 1}
    rest = {"certificate_not_after": 0.0, "fedge_version": "", "bundle": "", "enrolled": 0.0}
    row = {"id": name, "tier": "micro", "status": "active", "last_seen": seen}
    connection.execute(schema.devices.insert().values(**row, **zero, **rest))


def _report(connection: sa.Connection, version: int, kind: str = "installed", name: str = "ann") -> None:
    row = {"device_id": name, "kind": kind, "version": version, "value": 1.0, "reported": NOW}
    connection.execute(schema.rollout_reports.insert().values(**row))


def _runs_on_a_device(connection: sa.Connection) -> None:
    _device(connection)
    _report(connection, 1)
    _report(connection, 3, "install_failed")


def _has_failed_on_a_device(connection: sa.Connection) -> None:
    _device(connection)
    _report(connection, 1, "install_failed")


def _ran_on_a_device(connection: sa.Connection) -> None:
    _device(connection)
    _report(connection, 1)
    _report(connection, 4)


def _went_back_to_it_by_itself(connection: sa.Connection) -> None:
    _ran_on_a_device(connection)
    _report(connection, 4, "healthy")
    _report(connection, 4, "unhealthy")


def _runs_on_a_device_that_is_gone(connection: sa.Connection) -> None:
    _device(connection, seen=NOW - 91 * DAY)
    _report(connection, 1)


def _was_told_of(connection: sa.Connection) -> None:
    row = {
        "device_id": "ann",
        "slot": 1,
        "tier": "micro",
        "version": 1,
        "tags": [],
        "received": NOW,
        "body": b"",
    }
    connection.execute(schema.telemetry_windows.insert().values(**row))


def _rollout(
    connection: sa.Connection, version: int, status: str, *, newest: bool = True, **state: int
) -> None:
    body = {"status": status, "version": version, "base": 0, "replacement": None} | state
    row = {"id": f"micro-{version}", "tier": "micro", "version": version, "plan": {}, "created": NOW}
    connection.execute(schema.rollouts.insert().values(state=body, **row))
    if newest:
        row = {"tier": "micro", "base": 0, "floor": 0, "rollout": f"micro-{version}"}
        connection.execute(schema.rollout_tiers.insert().values(**row))


def _is_the_base(connection: sa.Connection) -> None:
    row = {"tier": "micro", "base": 1, "floor": 0, "rollout": None}
    connection.execute(schema.rollout_tiers.insert().values(**row))


def _is_rolled_out(connection: sa.Connection) -> None:
    _rollout(connection, 1, "paused")


def _is_the_way_back(connection: sa.Connection) -> None:
    _rollout(connection, 4, "running", base=1)


def _is_the_way_back_of_what_is_done(connection: sa.Connection) -> None:
    _rollout(connection, 4, "done", base=1)


def _was_the_way_back_of_an_older_one(connection: sa.Connection) -> None:
    _rollout(connection, 3, "superseded", newest=False, base=1)


def _run(connection: sa.Connection, status: str) -> None:
    config = {"model": {"name": "cnn", "start": "release:1"}}
    row = {"id": "next", "task": "t", "seed": 0, "config": config, "data": "", "status": status, "reason": ""}
    connection.execute(schema.runs.insert().values(created="2026", **row))


def _is_begun_with(connection: sa.Connection) -> None:
    _run(connection, "queued")


def _was_begun_with(connection: sa.Connection) -> None:
    _run(connection, "done")


def _is_learned_from(connection: sa.Connection) -> None:
    config = {"model": {"distil_from": "release:1"}}
    row = {"name": "again", "task": "t", "config": config, "terms": {}, "created": NOW}
    connection.execute(schema.learnings.insert().values(state={"status": "watching", "cycle": 0}, **row))


@pytest.mark.parametrize(
    ("hold", "stays"),
    [
        pytest.param(hold, stays, id=hold.__name__.strip("_"))
        for hold, stays in (
            (_runs_on_a_device, True),
            (_has_failed_on_a_device, False),
            (_ran_on_a_device, False),
            (_went_back_to_it_by_itself, True),
            (_runs_on_a_device_that_is_gone, False),
            (_was_told_of, True),
            (_is_the_base, True),
            (_is_rolled_out, True),
            (_is_the_way_back, True),
            (_is_the_way_back_of_what_is_done, True),
            (_was_the_way_back_of_an_older_one, False),
            (_is_begun_with, True),
            (_was_begun_with, False),
            (_is_learned_from, True),
        )
    ],
)
def test_an_old_release_is_kept_while_something_may_ask_for_it(
    home: Home, registry: Registry, hold: Callable[[sa.Connection], None], stays: bool
) -> None:
    first = release(registry, 1, "micro")
    for version in (2, 3, 4):
        release(registry, version, "micro")
    with writing(registry.engine) as connection:
        hold(connection)
    done = pruned(home, registry)
    assert ((1, "micro") not in done.retired.variants) == stays
    assert (2, "micro") in done.retired.variants
    assert there(registry, first) == (set(first) if stays else {"evidence micro"})


def test_rows_of_single_devices_go_with_a_release_but_for_what_each_has_reported_last(
    home: Home, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forgetting, "BATCH", 1)
    for version in (1, 2, 3, 4):
        release(registry, version, "micro")
    with writing(registry.engine) as connection:
        for number, name in enumerate(("ann", "bob")):
            _device(connection, seen=NOW - 91 * DAY, name=name, number=number)
        for version in (1, 2, 4):
            _rollout(connection, version, "superseded", newest=False)
        for name, versions in {"ann": (1, 2), "bob": (1, 2, 4)}.items():
            for version in versions:
                _report(connection, version, name=name)
                _report(connection, version, "healthy", name=name)
                row = {"device_id": name, "stage": 0, "state": "installed", "offered": NOW}
                connection.execute(
                    schema.rollout_devices.insert().values(rollout_id=f"micro-{version}", **row)
                )
    pruned(home, registry)
    columns = schema.rollout_reports.c
    with reading(registry.engine) as connection:
        left = set(
            map(tuple, connection.execute(sa.select(columns.device_id, columns.version, columns.kind)))
        )
        kinds = ("installed", "healthy")
        assert left == {("ann", 2, kind) for kind in kinds} | {("bob", 4, kind) for kind in kinds}
        assert list(connection.scalars(sa.select(schema.rollout_devices.c.rollout_id))) == ["micro-4"]
        assert len(list(connection.scalars(sa.select(schema.rollouts.c.id)))) == 3


def test_of_runs_that_are_over_the_newest_keep_their_last_round(home: Home, registry: Registry) -> None:
    models = {}
    for run in ("a", "b", "c"):
        registry.begin_run(run, task="digits", seed=0, config={}, data="d")
        models[run] = [commit(registry, number, run) for number in (10 * len(models), 10 * len(models) + 1)]
    for run in ("a", "b"):
        registry.end_run(run, "done" if run == "a" else "failed", "")
        home.run_model(run).parent.mkdir(parents=True)
        home.run_model(run).write_bytes(b"the model")
        (home.run(run) / "report.html").write_bytes(b"the report")
    done = pruned(home, registry, Keep(runs=1))
    assert done.retired == Retired(runs=frozenset({"a"}))
    kept = {run: [registry.store.has(digest) for digest in found] for run, found in models.items()}
    assert kept == {"a": [False, False], "b": [False, True], "c": [True, True]}
    assert [(home.run_model(run).exists(), len(registry.records(run))) for run in "ab"] == [
        (False, 2),
        (True, 2),
    ]
    assert (home.run("a") / "report.html").exists()
    assert registry.last_round("b") is not None
    check_whole(registry)
    gone = r"run a: its model and state were removed on 2027-01-15 at 08:00 UTC"
    with pytest.raises(UserError, match=gone):
        registry.last_round("a")
    assert commit(registry, 1) == models["a"][1]  # a release may name the same model, and none the state
    registry.store.remove(sha256(b"the same state"))
    with pytest.raises(UserError, match=gone):
        registry.last_round("a")


def test_a_run_that_others_begin_with_by_its_folder_or_file_stays_until_they_are_done(
    home: Home, registry: Registry
) -> None:
    starts = {"first": None, "second": "/home/runs/first/model.safetensors", "third": "runs/second/"}
    for run, start in starts.items():
        config = {"model": {"name": "cnn", "start": start}}
        registry.begin_run(run, task="digits", seed=0, config=config, data="d")
        commit(registry, 1, run)
        registry.end_run(run, "failed", "")
    for ended, left in (("", "r third second first"), ("third", "r third first"), ("third", "r third")):
        if ended:
            registry.end_run(ended, "done", "")
        pruned(home, registry, Keep(runs=1))
        assert {run["id"] for run in registry.runs() if run["retired"] is None} == set(left.split())


def test_a_run_that_goes_on_though_it_was_retired_keeps_its_rounds_and_is_begun_no_more(
    home: Home, registry: Registry
) -> None:
    for run in ("a", "b"):
        registry.begin_run(run, task="digits", seed=0, config={}, data="d")
        commit(registry, 1, run)
        registry.end_run(run, "stopped", "")
    model = home.run_model("a")
    model.parent.mkdir(parents=True)
    model.write_bytes(b"the model")
    with writing(registry.engine) as connection:
        connection.execute(schema.runs.update().where(schema.runs.c.id == "a").values(retired=NOW))
    for again in (
        lambda: registry.begin_run("a", task="digits", seed=0, config={}, data="d"),
        lambda: registry.queue_again("a"),
    ):
        with pytest.raises(UserError, match="run a: its model and state were removed on 2027"):
            again()
    registry.set_status("a", "running")  # by a process from before
    digest = commit(registry, 2, "a")
    pruned(home, registry)
    assert registry.store.has(digest)
    assert model.exists()
    assert registry.last_round("a") is not None
    registry.end_run("a", "done", "")
    pruned(home, registry)
    assert not registry.store.has(digest)
    assert not model.exists()
    registry.queue_again("b")
    with pytest.raises(UserError, match="run b: is queued; only a failed or stopped run is resumed"):
        registry.queue_again("b")
    with pytest.raises(UserError, match="run 'x': there is none"):
        registry.queue_again("x")


def test_a_store_stops_growing(home: Home, registry: Registry) -> None:
    """Twenty cycles of a run and its release: what is left is of the newest, and what tells of lineage."""
    large = []
    for cycle in range(1, 21):
        run = f"digits-{cycle:02}"
        registry.begin_run(run, task="digits", seed=0, config={}, data="d")
        for number in range(3):
            commit(registry, 10 * cycle + number, run)
        registry.end_run(run, "done", "")
        release(registry, cycle, "micro")
        pruned(home, registry, Keep(releases=3, runs=2))
        with reading(registry.engine) as connection:
            told = {*connection.scalars(sa.select(schema.variants.c.evidence))}
            told |= {*connection.scalars(sa.select(schema.releases.c.manifest))}
        large.append(sum(1 for each in registry.store.lying() if each.digest not in told))
    assert set(large[3:]) == {
        3 * 4 + 2 + 1
    }  # four objects of each release, two models of runs and their state
    assert len(registry.runs()) == 21


# Kills and races


def test_killed_at_any_removal_all_that_is_needed_is_whole_and_the_next_time_goes_on(
    home: Home, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        """Nothing catches it, as nothing catches a kill."""

    def until(count: int) -> Callable[..., None]:
        left, real = iter(range(count)), os.unlink

        def unlink(path: Path, missing_ok: bool = False) -> None:
            if next(left, None) is None:
                raise Killed
            real(path)

        return unlink

    monkeypatch.setattr(pruning, "BATCH", 2)
    olds = [release(registry, version, "micro") for version in (1, 2)]
    for version in (3, 4):
        release(registry, version, "micro")
    for steps in range(3):
        monkeypatch.setattr(Path, "unlink", until(steps))
        with pytest.raises(Killed):
            pruned(home, registry)
        check_whole(registry)
        with reading(registry.engine) as connection:
            assert not facts(connection, Keep(), NOW).variants & {(1, "micro"), (2, "micro")}
    monkeypatch.undo()
    assert pruned(home, registry).files == 8 - (0 + 1 + 2)
    assert [there(registry, old) for old in olds] == [{"evidence micro"}] * 2
    check_whole(registry)


def test_what_is_put_and_not_named_yet_is_waited_for(
    home: Home, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    rest = registry.store.put(b"of a publisher that was killed")
    with registry.store.adding():
        wire = registry.store.put(b"new")
        with pytest.raises(FedgeError, match="something is being put into it all the time"):
            pruned(home, registry)
        assert registry.store.has(wire)
        assert registry.store.has(rest)
        values = {"release": 1, "tier": "micro", "recipe": "", "wire": wire, "installed": "", "evidence": ""}
        release(registry, 1)
        with writing(registry.engine) as connection:
            connection.execute(schema.variants.insert().values(golden=wire, **values))
    assert pruned(home, registry).files == 1
    assert registry.store.has(wire)
    assert not registry.store.has(rest)
    monkeypatch.setattr(store, "ADDING_PATIENCE_S", 0.0)
    with (
        registry.store.removing(),
        pytest.raises(FedgeError, match="another process removes"),
        registry.store.adding(),
    ):
        pass


def test_a_file_that_was_written_just_now_stays(home: Home, registry: Registry) -> None:
    young = registry.store.put(b"of a fedge that knows no lock")
    rest = registry.store.path(young).with_name(".cut-off.abc")
    rest.write_bytes(b"half of")
    foreign = registry.store.folder / "notes"
    foreign.write_bytes(b"of a person")
    now = time.time()
    assert prune(home, registry, Keep(), now=now).files == 0
    assert prune(home, registry, Keep(), now=now + pruning.GRACE_S + 60).files == 2
    assert not rest.exists()
    assert foreign.exists()


def test_rounds_that_are_committed_while_it_is_swept_again_and_again_are_whole(
    home: Home, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruning, "PATIENCE_S", 5.0)
    names = ["x", "y"]
    for run in names:
        registry.begin_run(run, task="digits", seed=0, config={}, data="d")

    def work(run: str) -> None:  # all of them have the same bytes
        for number in range(12):
            commit(registry, number, run)

    workers = [threading.Thread(target=work, args=(run,)) for run in names]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        pruned(home, registry)
        check_whole(registry)
    for worker in workers:
        worker.join()
    pruned(home, registry)
    assert [last.record.round for run in names if (last := registry.last_round(run))] == [11, 11]
    assert sum(1 for _ in registry.store.lying()) == 3  # two models and the state


def test_the_disks_refusal_is_said(home: Home, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.store.put(b"of nobody")

    def refused(*_: object, **__: object) -> Iterator[None]:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", refused)
    with pytest.raises(FedgeError, match="cannot be tidied \\(Read-only file system\\)"):
        pruned(home, registry)
