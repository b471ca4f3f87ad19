"""Learning again, over a real registry and real drafts: each step is done once, wherever it was killed."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from fedge.config import Config
from fedge.errors import UserError
from fedge.manifest import Lineage
from fedge_server.continual.learnings import Learnings, subject
from fedge_server.continual.state import Asked, Status
from fedge_server.continual.steps import World, look, versions
from fedge_server.continual.terms import Terms
from fedge_server.drift.watch import Alarm, Watch
from fedge_server.hub import learning as hub_learning
from fedge_server.hub.home import Home
from fedge_server.hub.learning import Learner, learn_always
from fedge_server.registry import schema
from fedge_server.registry.database import Registry
from fedge_server.registry.drafts import mark
from fedge_server.registry.engine import writing
from fedge_server.release import ReleasePlace, publish_draft
from fedge_server.repository import create_key
from fedge_server.rollout.audit import Audit
from fedge_server.rollout.reports import Report
from fedge_server.rollout.service import Rollouts
from fedge_server.rollout.state import Status as Rollout

CONFIG = Config.from_mapping({"task": "digits", "tiers": {"micro": {}, "board": {}}}).to_mapping()
ROLLOUT = {
    "stages": [{"name": "all", "percent": 100, "hold_h": 0.1}],
    "criteria": {"install": {"tolerated": 0.02, "unacceptable": 0.1, "at_least": 3}},
}
TERMS = Terms.from_mapping({"min_gap_s": 100.0, "remember": 0.5, "rollout": ROLLOUT})
TIERS = ("micro", "board")


@dataclass
class Site:
    """A home, its registry, a clock, and what workers and devices do there."""

    home: Path
    registry: Registry
    drafted: Callable[..., str]
    now: float = 1e9
    looks: bool = False  # the hub does, now
    learner: Learner = field(init=False)

    def __post_init__(self) -> None:
        self.again()

    def again(self) -> None:
        """A hub that was killed is up again."""
        self.learner = Learner(Home(self.home), self.registry, lambda: self.now)

    def look(self) -> bool:
        """The hub looks once; returns whether a run was queued."""
        self.looks = True
        try:
            return self.learner.advance()
        finally:
            self.looks = False

    @property
    def learnings(self) -> Learnings:
        return Learnings(self.registry.engine, lambda: self.now)

    @property
    def rollouts(self) -> Rollouts:
        return Rollouts(self.registry, lambda: self.now)

    @property
    def status(self) -> Status:
        return self.learnings.get("digits").state.status

    def start(self, terms: Terms = TERMS) -> None:
        self.learnings.start("digits", "digits", CONFIG, terms, who="ann")

    def alarm(self, tier: str, version: int) -> None:
        state = Watch(alarm=Alarm("inputs", 9.5, 7)).to_json()
        with writing(self.registry.engine) as connection:
            connection.execute(schema.drift_watches.insert().values(tier=tier, version=version, state=state))

    def work(self, run_id: str, *tiers: str) -> None:
        """What a run's process does."""
        run = self.registry.run(run_id)
        assert run is not None
        if run["status"] == "done":
            return
        if not self.registry.drafts.of_run(run_id):
            lineage = Lineage(run_id, 3, self.registry.store.put(run_id.encode()), "b" * 64)
            self.drafted(*tiers, lineage=lineage, answer=int(run_id.rsplit("-", 1)[1]) % 3)
        self.registry.end_run(run_id, "done", "all rounds are done")

    def install(self, bad: bool = False) -> None:
        """Devices report what they were offered; then the stage holds until it is over."""
        for state in self.rollouts.newest():
            if state.status in (Rollout.RUNNING, Rollout.HOLDING):
                for number in range(4):
                    device, has = f"{state.tier}-{number}", state.base
                    if self.rollouts.offer(device, has) == state.version:
                        kind = "install_failed" if bad else "installed"
                        self.rollouts.note(Report(device, state.version, kind))
        self.now += 1000


def add_devices(registry: Registry) -> None:
    rows = [
        {
            "id": f"{tier}-{n}", "node_id": n + 10 * ord(tier[0]), "tier": tier, "public_key": "",
            "sealing_key": "", "status": "active", "reason": "", "enrolled": 0.0,
            "certificate_not_after": 0.0, "wire_version": 1, "fedge_version": "", "bundle": "",
        }
        for tier in TIERS
        for n in range(4)
    ]  # fmt: skip
    with writing(registry.engine) as connection:
        connection.execute(schema.devices.insert(), rows)


def rolled_out(site: Site) -> Site:
    """Devices of both tiers have release 1, whose rollouts are done."""
    for tier in TIERS:
        site.rollouts.start(1, tier, TERMS.plan, who="ann")
    site.install()
    site.rollouts.tick()
    assert versions(site.registry.engine, TIERS) == dict.fromkeys(TIERS, 1)
    return site


def cheap_publisher(_: Home, registry: Registry) -> Callable[[str], None]:
    """Signs nothing: what a publisher that is killed leaves behind has tests of its own."""

    def publish(draft_id: str) -> None:
        draft = registry.drafts.get(draft_id)
        version = max((row["version"] for row in registry.releases()), default=0) + 1
        entries = [entry for entry in draft.release.variants if entry.tier in draft.open]
        variants = [
            {"tier": e.tier, "recipe": "r", "wire": "w", "installed": e.installed_sha256, "evidence": "e"}
            for e in entries
        ]

        def further(connection: sa.Connection) -> None:
            for entry in entries:
                mark(connection, draft_id, entry.tier, "published", release=version)

        registry.record_release(
            version=version, run_id=draft.release.lineage.run, round_number=3, global_model="g",
            manifest=b"{}", variants=variants, further=further,
        )  # fmt: skip

    return publish


@pytest.fixture
def site(
    home: Path, registry: Registry, drafted: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> Site:
    """Without signatures: see `cheap_publisher`."""
    monkeypatch.setattr(hub_learning, "publisher", cheap_publisher)
    add_devices(registry)
    cheap_publisher(Home(home), registry)(drafted(*TIERS))
    return rolled_out(Site(home, registry, drafted))


@pytest.fixture
def signing(home: Path, registry: Registry, server: ReleasePlace, drafted: Callable[..., str]) -> Site:
    """With a repository and the keys of both tiers."""
    for tier in TIERS:
        create_key(server.keys / f"tier-{tier}.key")
    add_devices(registry)
    assert publish_draft(server, registry, drafted(*TIERS)).release is not None
    return rolled_out(Site(home, registry, drafted))


@pytest.mark.slow
@pytest.mark.parametrize(
    "database", ["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)], indirect=True
)
def test_drift_leads_to_a_run_a_release_and_rollouts_and_is_answered(signing: Site) -> None:
    site = signing
    site.start()
    assert site.look() is False
    site.alarm("board", 1)
    assert site.look() is True  # a run was queued
    run = site.registry.run("digits-1")
    assert run is not None
    assert run["status"] == "queued"
    model = Config.from_mapping(run["config"]).model
    assert (model.start, model.remember) == ("release:1", 0.5)
    site.work("digits-1", *TIERS)
    assert site.look() is False
    assert site.status is Status.ROLLING_OUT
    assert {state.id: state.status.value for state in site.rollouts.newest()} == {
        "micro-2": "running",
        "board-2": "running",
    }
    site.install()
    site.look()  # lets the stage's time pass
    site.look()
    state = site.learnings.get("digits").state
    assert (state.status, state.version, state.answered) == (Status.WATCHING, 2, 1)
    site.now += 1000
    assert site.look() is False  # the alarm under release 1 begins no second cycle
    assert [entry.what for entry in Audit(site.registry.engine).entries(subject("digits"))] == [
        "learning begun",
        "cycle 1 begun",
        "cycle 1: awaits a signature",
        "cycle 1: release 2",
        "cycle 1 done",
    ]


class Killed(BaseException):
    """The process is gone; no handler of errors may see it."""


@contextmanager
def killed_before(site: Site, number: int) -> Iterator[list[int]]:
    """Kill a hub before the writing transaction of this number; yields how many it began."""
    engine, seen = site.registry.engine, [0]

    def begins(connection: sa.Connection) -> None:
        if site.looks and connection.get_execution_options().get("fedge_writes"):
            seen[0] += 1
            if seen[0] == number:
                raise Killed

    sa.event.listen(engine, "begin", begins)
    try:
        yield seen
    finally:
        sa.event.remove(engine, "begin", begins)


def a_cycle(site: Site) -> None:
    """Look again and again, with workers and devices that do their part, until the cycle is over."""
    for _ in range(12):
        site.look()
        if site.registry.run("digits-1") is not None:
            site.work("digits-1", *TIERS)
        site.install()
        if site.learnings.get("digits").state.version and site.status is Status.WATCHING:
            return
    raise AssertionError(f"still {site.status}")


@pytest.mark.slow
def test_killed_at_any_point_it_goes_on_and_does_each_step_once(site: Site, tmp_path: Path) -> None:
    site.start()
    site.alarm("micro", 1)
    engine, database, number = site.registry.engine, site.home / "fedge.db", 1
    with closing(sqlite3.connect(database)) as there, closing(sqlite3.connect(tmp_path / "saved")) as saved:
        there.backup(saved)
    while True:
        site.again()
        with killed_before(site, number) as seen:
            try:
                a_cycle(site)
            except Killed:
                assert seen[0] == number
            else:
                break
        site.again()
        a_cycle(site)
        assert [run["id"] for run in site.registry.runs()] == ["run-1", "digits-1"]
        assert [row["version"] for row in site.registry.releases()] == [1, 2]
        assert sorted(state.id for state in site.rollouts.all()) == [
            "board-1",
            "board-2",
            "micro-1",
            "micro-2",
        ]
        assert len(site.registry.drafts.of_run("digits-1")) == 1
        number += 1
        engine.dispose()
        for suffix in ("-wal", "-shm"):
            database.with_name(database.name + suffix).unlink(missing_ok=True)
        shutil.copyfile(tmp_path / "saved", database)
    assert number > 10


@pytest.mark.slow
def test_without_a_key_a_cycle_awaits_its_signature_and_goes_on_by_itself_once_there_is_one(
    signing: Site, server: ReleasePlace, tmp_path: Path
) -> None:
    site = signing
    key = server.keys / "tier-board.key"
    key.rename(tmp_path / "away")
    site.start()
    site.learnings.happened("digits", Asked("ann", "new sensors"))
    site.look()
    site.work("digits-1", *TIERS)
    for _ in range(2):
        site.look()
    assert site.status is Status.AWAITING_SIGNATURE
    assert {state.id for state in site.rollouts.newest()} == {"micro-2", "board-1"}  # micro does not wait
    tries = len(site.registry.releases())
    (tmp_path / "away").rename(key)
    site.look()
    assert (len(site.registry.releases()), site.status) == (tries, Status.AWAITING_SIGNATURE)  # not yet again
    site.now += 61
    site.look()
    assert site.status is Status.ROLLING_OUT
    assert {state.id for state in site.rollouts.newest()} == {"micro-2", "board-3"}


@pytest.mark.slow
def test_a_rollout_that_halts_fails_the_cycle_and_the_next_one_waits_longer(site: Site) -> None:
    site.start()
    site.alarm("micro", 1)
    for _ in range(3):
        site.look()
        if site.registry.run("digits-1"):
            site.work("digits-1", *TIERS)
    assert site.status is Status.ROLLING_OUT
    site.install(bad=True)
    ended = site.now
    site.look()
    state = site.learnings.get("digits").state
    assert (state.status, state.failures, state.answered) == (Status.WATCHING, 1, 0)
    (failed,) = [e for e in Audit(site.registry.engine).entries(subject("digits")) if "failed" in e.what]
    assert "rollout micro-2: its way back is ordered" in failed.why
    site.now = ended + 199
    assert site.look() is False
    site.now = ended + 201  # twice the gap
    assert site.look() is False  # the way back comes first: no rollout could begin
    # The old content comes back under a new version, which is watched anew: the drift is still not answered.
    for tier, version in (("micro", 3), ("board", 4)):
        assert site.look() is False
        cheap_publisher(Home(site.home), site.registry)(site.drafted(tier))
        site.rollouts.replaced(f"{tier}-2", version, who="ann")
        for number in range(4):
            site.rollouts.note(Report(f"{tier}-{number}", version, "installed"))
    assert versions(site.registry.engine, TIERS) == {"micro": 3, "board": 4}
    assert site.look() is True
    assert site.registry.run("digits-2")["status"] == "queued"


@pytest.mark.parametrize(
    ("status", "reason", "said"),
    [
        ("failed", "no device came", "run digits-1: failed (no device came)"),
        ("stopped", "asked to stop", "run digits-1: stopped (asked to stop)"),
        ("done", "all rounds are done", "no tier has a variant that passed its gate"),
    ],
)
def test_a_run_that_brings_nothing_fails_the_cycle(site: Site, status: str, reason: str, said: str) -> None:
    site.start()
    site.alarm("micro", 1)
    site.look()
    site.registry.set_status("digits-1", status, reason)
    site.look()
    assert site.status is Status.WATCHING
    assert said in Audit(site.registry.engine).entries(subject("digits"))[-1].why


def test_signers_that_refuse_all_tiers_fail_the_cycle(site: Site) -> None:
    site.start()
    site.alarm("micro", 1)
    site.look()
    site.work("digits-1", *TIERS)
    (draft,) = site.registry.drafts.of_run("digits-1")
    with writing(site.registry.engine) as connection:
        for tier in TIERS:
            mark(connection, draft.id, tier, "refused", reason="the drop is 3 points")
    site.look()
    assert site.status is Status.WATCHING
    assert "micro: refused: the drop" in Audit(site.registry.engine).entries(subject("digits"))[-1].why


def test_a_cycle_is_compressing_once_the_rounds_are_over(site: Site) -> None:
    site.start()
    site.alarm("micro", 1)
    site.look()
    site.registry.set_status("digits-1", "running")
    site.look()
    assert site.status is Status.RUNNING
    (site.home / "runs" / "digits-1" / "model.safetensors").write_bytes(b"")
    site.look()
    assert site.status is Status.COMPRESSING


def test_a_new_learning_counts_on_from_runs_of_its_name_and_old_ones_keep_their_state(site: Site) -> None:
    site.registry.begin_run("digits-7", task="digits", seed=0, config={}, data="")
    site.start()
    assert site.learnings.get("digits").state.cycle == 7
    site.learnings.happened("digits", Asked("ann"))
    assert site.learnings.start("digits", "digits", CONFIG, Terms(), who="ann").state.cycle == 8
    with pytest.raises(UserError, match="cycle 8 is running; stop it first"):
        site.learnings.remove("digits", who="ann")
    with pytest.raises(UserError, match="learnings: digits"):
        site.learnings.get("images")


def test_a_tier_is_of_one_learning_alone(site: Site) -> None:
    site.start()
    site.start()  # it may be changed
    with pytest.raises(UserError, match=r"learning other: tier 'board' is that of learning digits already"):
        site.learnings.start("other", "digits", {"tiers": {"board": {}}}, TERMS, who="ann")
    site.learnings.start("other", "digits", {"tiers": {"gateway": {}}}, TERMS, who="ann")
    assert [each.name for each in site.learnings.all()] == ["digits", "other"]


def test_before_there_is_a_release_a_run_begins_as_its_configuration_says(site: Site) -> None:
    config = Config.from_mapping({"task": "digits", "tiers": {"other": {}}}).to_mapping()
    world = World(Home(site.home), site.registry, lambda _: None)
    learnings = Learnings(site.registry.engine)
    learnings.start("first", "digits", config, Terms.from_mapping({"every_s": 60}), who="ann")
    learning = learnings.happened("first", look(world, learnings.get("first")))
    look(world, learning)
    assert site.registry.run("first-1") is not None
    assert site.registry.run("first-1")["config"] == config  # type: ignore[index]


def test_a_hub_looks_again_when_something_has_changed_and_survives_what_goes_wrong(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found: list[Any] = [False, OSError("no disk"), True]
    told: list[int] = []

    async def main() -> None:
        changed, over = asyncio.Event(), asyncio.Event()

        def advance(_: Any) -> bool:
            one = found.pop(0)
            if isinstance(one, Exception):
                raise one
            return bool(one)

        async def tell() -> None:
            told.append(len(found))
            over.set()

        monkeypatch.setattr(Learner, "__init__", lambda *_: None)
        monkeypatch.setattr(Learner, "advance", advance)
        nothing: Any = None
        task = asyncio.create_task(learn_always(nothing, nothing, tell, changed, look_s=1000.0))
        while not over.is_set():
            changed.set()
            await asyncio.sleep(0.001)
        task.cancel()

    asyncio.run(asyncio.wait_for(main(), 10))
    assert told == [0]
    assert "no disk" in caplog.text


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"evry_s": 1}, "unknown key 'evry_s'"),
        ({"every_s": "week"}, "must be a number"),
        ({"drift": 1}, "must be true or false"),
        ({"most_cycles": 1.5}, "must be a whole number"),
        ({"remember": 2}, "remember = 2: must be 0 to below 1"),
        ({"begin": "old"}, "must be 'newest' or 'anew'"),
        ({"rollout": 3}, "must be a table"),
        ({"rollout": {}}, "0 stages"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_terms_that_are_none_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Terms.from_mapping(values)


def test_terms_survive_json() -> None:
    assert Terms.from_mapping(TERMS.to_json()) == TERMS
    assert Terms.from_mapping(Terms().to_json()) == Terms()
