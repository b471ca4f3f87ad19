"""What the hub tells Prometheus: a real hub that is scraped, and the parts that look things up."""

from __future__ import annotations

import asyncio
import http.client
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import sqlalchemy as sa
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from fedge.errors import ConfigError, FedgeError
from fedge_server.hub.settings import Settings
from fedge_server.monitoring import metrics
from fedge_server.monitoring.rounds import Rounds
from fedge_server.monitoring.serving import AT_ONCE, Exporter
from fedge_server.monitoring.signals import round_committed
from fedge_server.monitoring.state import Kept, Seen, State, folder_bytes
from fedge_server.registry import schema
from fedge_server.registry.database import Registry
from fedge_server.rounds.record import Rejected, RoundRecord, Score

WAIT_S = 10.0
Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def get(port: int, path: str = "/metrics") -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT_S)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def series(text: str) -> Series:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(found: Series, name: str, **labels: str) -> float:
    return found.get((name, tuple(sorted(labels.items()))), 0.0)


def checked(text: str) -> None:
    """By Prometheus's own tool, where it is installed."""
    if tool := shutil.which("promtool"):
        done = subprocess.run(
            [tool, "check", "metrics"], input=text, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.slow
def test_a_hub_tells_of_devices_messages_and_refusals_without_naming_a_device(
    tools: Any, tmp_path: Path
) -> None:
    async def scenario(rig: Any) -> None:
        await rig.up()
        port = rig.hub._monitor.port

        async def scrape() -> tuple[str, Series]:
            status, text = await asyncio.to_thread(get, port)
            assert status == 200
            return text, series(text)

        _, before = await scrape()
        here, sent_away = rig.device(tier="micro"), rig.device(tier="board")
        stream = await here.welcome()
        await rig.run()
        await rig.push("m1", "m2", to=here)
        assert {(await stream.work()).message_id for _ in range(2)} == {"m1", "m2"}
        await tools.submit(here.stub(), "m1", tools.answer_of(b"abc"), b"abc")
        rig.registry.devices.revoke(sent_away.id, "stolen")
        code, _ = await (await sent_away.connect()).end()
        assert code is grpc.StatusCode.PERMISSION_DENIED
        text, after = await scrape()

        def more(name: str, **labels: str) -> float:
            return value(after, name, **labels) - value(before, name, **labels)

        assert value(after, "fedge_devices_online", tier="micro") == 1
        assert value(after, "fedge_messages_open") == 1
        assert more("fedge_connections_total", tier="micro") == 1
        assert more("fedge_messages_total") == 2
        assert more("fedge_answers_total", outcome="accepted") == 1
        assert more("fedge_answer_seconds_count") == 1
        assert more("fedge_link_bytes_total", direction="up") == 3
        assert more("fedge_certificates_refused_total", reason="revoked") == 1
        assert more("fedge_security_events_total", event="certificate_refused") == 1
        assert value(after, "fedge_database_up") == 1
        assert value(after, "fedge_disk_free_bytes") > 0
        assert value(after, "fedge_certificate_expiry_timestamp_seconds", certificate="server") > time.time()
        assert here.id[:16] not in text
        assert sent_away.id[:16] not in text
        checked(text)
        await rig.down()
        with pytest.raises(OSError, match="refused"):
            get(port)

    rig = tools.rig(tmp_path / "home")
    rig.settings = Settings.from_mapping(
        {
            "listen": {"host": "127.0.0.1", "link_port": 0, "enrolment_port": 0},
            "metrics": {"listen": "127.0.0.1:0"},
        }
    )

    async def main() -> None:
        try:
            await scenario(rig)
        finally:
            await rig.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"listen": "0.0.0.0:9445"}, "others can reach it"),
        ({"listen": "[::]:9445"}, "metrics.allow_remote = true"),
        ({"listen": "9445"}, "must be ADDRESS:PORT"),
        ({"listen": "127.0.0.1:65536"}, "must be ADDRESS:PORT"),
        ({"listen": "localhost:9445"}, "must be ADDRESS:PORT"),
        ({"lisen": ""}, "did you mean 'listen'?"),
    ],
)
def test_an_address_that_others_reach_or_that_is_none_is_refused(table: Any, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Settings.from_mapping({"metrics": table})
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_remote_address_can_be_allowed() -> None:
    for listen, place in (("0.0.0.0:9445", ("0.0.0.0", 9445)), ("[::1]:0", ("::1", 0)), ("", None)):
        assert (
            Settings.from_mapping({"metrics": {"listen": listen, "allow_remote": True}}).metrics.place
            == place
        )


@contextmanager
def exporting(registry: CollectorRegistry) -> Iterator[int]:
    exporter = Exporter("127.0.0.1", 0, registry)
    try:
        yield exporter.port
    finally:
        exporter.stop()


def test_only_its_path_is_answered_and_a_failed_look_is_a_failed_scrape(tmp_path: Path) -> None:
    class Broken:
        def collect(self) -> Any:
            raise TimeoutError

        def describe(self) -> Any:
            return []

    registry = metrics.counted()
    with exporting(registry) as port:
        assert get(port, "/")[0] == 404
        assert get(port)[0] == 200
        registry.register(Broken())
        assert get(port)[0] == 503
        with pytest.raises(FedgeError, match="is the port taken"):
            Exporter("127.0.0.1", port, registry)


def test_callers_that_stall_are_few_and_do_not_keep_others_out_for_ever() -> None:
    with exporting(metrics.counted()) as port:
        stalled = [socket.create_connection(("127.0.0.1", port)) for _ in range(AT_ONCE)]
        deadline = time.monotonic() + WAIT_S
        with pytest.raises(OSError):  # noqa: PT012 - until all of them are in their threads
            while time.monotonic() < deadline:
                get(port)
        for one in stalled:
            one.close()
        while time.monotonic() < deadline:
            try:
                assert get(port)[0] == 200
                return
            except OSError:
                time.sleep(0.02)
        raise AssertionError("it never answered again")


def test_what_costs_is_looked_up_once_for_all_who_ask_and_a_hanging_look_holds_nobody() -> None:
    calls, free = [], threading.Event()

    def find() -> list[Any]:
        calls.append(1)
        if len(calls) == 1:
            free.wait(WAIT_S)
        return [(metrics.RELEASES, (), len(calls))]

    kept = Kept(60.0, find, patience_s=0.05)
    for _ in range(2):
        with pytest.raises(FedgeError, match="too long"):
            kept.get()
    free.set()
    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            found = kept.get()
            break
        except FedgeError:
            assert time.monotonic() < deadline
    assert found == kept.get() == [(metrics.RELEASES, (), 1)]
    assert calls == [1]


def test_a_database_that_is_away_leaves_what_the_hub_holds(tmp_path: Path) -> None:
    from fedge_server.hub.home import Home

    engine = sa.create_engine(f"sqlite:///{tmp_path}/absent/x.db")
    state = State(lambda: (Seen(online={"micro": 3}), 0.01), dict, engine, Home(tmp_path))
    found = {family.name: family.samples for family in state.collect()}
    assert found["fedge_database_up"][0].value == 0
    assert found["fedge_devices_online"][0].value == 3
    assert "fedge_devices" not in found


def test_each_round_is_told_once_also_of_a_run_that_is_resumed(tmp_path: Path) -> None:
    def commit(registry: Registry, run: str, number: int) -> None:
        record = RoundRecord(number, {"loss": 0.5, "accuracy": 0.9})
        row = {"record": record.to_json(), "model": "", "state": "", "committed": ""}
        with registry.engine.begin() as connection:
            connection.execute(schema.rounds.insert().values(run_id=run, number=number, **row))

    def begin(registry: Registry, run: str) -> None:
        registry.begin_run(run, task="digits", seed=0, config={"rounds": {"count": 7}}, data="")

    told: list[tuple[str, int]] = []
    with Registry.open(tmp_path) as registry:
        for run in ("old", "over"):
            begin(registry, run)
            commit(registry, run, 1)
        registry.set_status("over", "done")
        with registry.engine.begin() as connection:
            connection.execute(schema.runs.update().values(created="2020-01-01T00:00:00+00:00"))
        rounds = Rounds(registry.engine, lambda run, record: told.append((run, record.round)))
        rounds.look()
        assert told == []  # committed before
        begin(registry, "new")
        for number in (0, 1):
            commit(registry, "new", number)
        commit(registry, "old", 2)
        for _ in range(2):
            rounds.look()
        assert sorted(told) == [("new", 1), ("old", 2)]
        commit(registry, "new", 2)
        registry.set_status("new", "failed", "x")
        rounds.look()
        assert told[-1] == ("new", 2)
        assert (rounds.last["new"][0].round, rounds.last["new"][1]) == (2, 7)
        registry.set_status("new", "queued")
        commit(registry, "new", 3)
        for _ in range(2):
            rounds.look()
        assert told[3:] == [("new", 3)]


def test_a_round_is_counted_by_reason_and_only_what_no_honest_device_does_is_a_signal(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def reads() -> tuple[float, ...]:
        registry = metrics.counted()
        return tuple(
            registry.get_sample_value(name, labels) or 0.0
            for name, labels in (
                ("fedge_updates_rejected_total", {"reason": "not_finite"}),
                ("fedge_updates_rejected_total", {"reason": "away"}),
                ("fedge_updates_standing_out_total", {}),
                ("fedge_update_anomaly_score_count", {}),
                ("fedge_update_anomaly_score_sum", {}),
            )
        )

    before = reads()
    record = RoundRecord(
        3,
        {},
        clients=2,
        asked=4,
        rejected=(Rejected(7, "NaN\nin it", "not_finite"), Rejected(8, "gone", "away")),
        anomalies=(Score(1, 0.5, -1.0), Score(2, 9.0, 0.1)),
    )
    with caplog.at_level("WARNING", logger="fedge.security"):
        round_committed("run-1", RoundRecord.from_json(record.to_json()))
    assert [after - b for after, b in zip(reads(), before, strict=True)] == [1, 1, 1, 2, 9.5]
    found = [(vars(each)["event"], vars(each)["node"], each.getMessage()) for each in caplog.records]
    assert [each[:2] for each in found] == [("update_rejected", 7), ("update_stands_out", 2)]
    assert "\n" not in found[0][2]


def test_the_size_of_a_folder_is_that_of_its_files_and_bounded(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "x").write_bytes(b"12345")
    (tmp_path / "a" / "b" / "y").write_bytes(b"678")
    (tmp_path / "a" / "loop").symlink_to("/")
    assert folder_bytes(tmp_path / "a") == 8 + len("/")
    assert folder_bytes(tmp_path / "absent") == 0
    assert folder_bytes(tmp_path, most=2) is None
