from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from fedge.errors import ConfigError
from fedge.task_digest import task_digest
from fedge_client.agent import settings
from fedge_client.agent.offers import digests_of
from fedge_client.agent.settings import OfferedTask, load

DOCUMENT = Path(__file__).parents[3] / "docs" / "agent.md"


def written(folder: Path, text: str) -> settings.AgentSettings:
    (folder / "agent.toml").write_text(text)
    return load(folder / "agent.toml")


def test_the_documented_file_is_read(tmp_path: Path) -> None:
    block = re.search(r"```toml\n(.*?)```", DOCUMENT.read_text("utf-8"), re.DOTALL)
    assert block is not None
    found = written(tmp_path, block[1])
    assert found.tags == ("north",)
    assert found.tasks == (
        OfferedTask("digits", tmp_path / "digits.npz"),
        OfferedTask("ours:TASK", tmp_path / "rows.csv", "died"),
    )
    assert (found.training.max_memory_bytes, found.training.nice) == (2_000_000_000, 10)


def test_every_key_stands_in_the_table_with_its_default(tmp_path: Path) -> None:
    rows = dict(re.findall(r"^\| `([a-z.A-Z_]+)` \| ([^|]*) \|", DOCUMENT.read_text("utf-8"), re.MULTILINE))
    tables = {
        "training": settings.Training(),
        "link": settings.LinkSettings(),
        "delivery": settings.DeliverySettings(),
        "telemetry": settings.TelemetrySettings(),
        "memory": settings.MemorySettings(),
        "metrics": settings.MetricsSettings(),
        "joint": settings.AskingSettings(),
    }
    for name, table in tables.items():
        for key in table.__dataclass_fields__:
            shown = rows.pop(f"{name}.{key}").replace(",", "").strip()
            words = {"none": None, "true": True, "false": False, '`"release"`': "release"}
            assert (words[shown] if shown in words else float(shown)) == getattr(table, key)
    assert set(rows) == {"tags"} | {
        f"tasks.NAME.{key}" for key in ("task", "data", "label", "size", "digest", "memory")
    }


def test_without_a_file_nothing_is_offered(tmp_path: Path) -> None:
    assert load(tmp_path / "agent.toml") == settings.AgentSettings()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("taks = 1", "unknown key 'taks': did you mean 'tasks'?"),
        ("[training]\nthread = 2", "unknown key 'training.thread': did you mean 'threads'?"),
        ("[tasks.digits]\npath = 'x'", "unknown key 'tasks.digits.path': "),
        ("[tasks.digits]\ndata = 3", "tasks.digits.data = 3: must be text"),
        ("tags = 'north'", "tags = 'north': must be a list"),
        ("tags = ['a b']", "'a b' is no tag"),
        ("[tasks.'a/b']", "'a/b' names no task"),
        ("[tasks.x]\ntask = 'a.b:'", "'a.b:' names no task"),
        ("[tasks.x]\ntask = 'digits'\n[tasks.digits]", "'digits' is offered twice"),
        ("[tasks.digits]\ndigest = 'abc'", "must be 64 hexadecimal digits"),
        ("[tasks.images]\nsize = [0, 8]", "must be [HEIGHT, WIDTH]"),
        ("[training]\nthreads = true", "training.threads = True: must be a number from 1 to 1024"),
        ("[training]\nidle_unload_s = nan", "training.idle_unload_s = nan: must be"),
        ("[training]\nmax_memory_bytes = 1000", "torch needs 500000000 or more"),
        ("[link]\nbackoff_max_s = 0.5", "must be 1 or more"),
        ("[telemetry]\nenabled = 1", "telemetry.enabled = 1: must be true or false"),
        ("[telemetry]\nperiod_s = 5", "telemetry: period_s = 5: must be 10 to 604800"),
        ("[telemetry]\nmost_epsilon = 5", "telemetry: most_epsilon needs epsilon"),
        ("[memory]\nsize = 30000", "memory: size = 30000: must be 1 to 20000"),
        ("[metrics]\ntextfile = 'fedge.txt'", "metrics.textfile = 'fedge.txt': must end with .prom"),
        ("[metrics]\ninterval_s = 0", "metrics.interval_s = 0.0: must be 1 to 3600"),
        ("[tasks.digits]\nmemory = 1", "tasks.digits.memory = 1: must be true or false"),
        ("[joint]\nenabled = 1", "joint.enabled = 1: must be true or false"),
        ("[joint]\nrule = 'hunch'", "joint.rule = 'hunch': must be one of release, confidence, margin"),
        ("[joint]\nrule = 'margin'", "a measure of doubt needs a threshold"),
        ("[joint]\nrule = 'cloud-only'\nthreshold = 0.1", "no other rule has one"),
        ("[joint]\nrule = 'entropy'\nthreshold = 2", "joint.threshold = 2: must be a number from 0 to 1"),
        ("[joint]\nshare = 1", "joint.share = 1.0: must be above 0 and below 1"),
        ("[joint]\nshare = 0.1\naccuracy = 0.9", "one of them, and only with joint.rule = 'release'"),
        ("[joint]\naccuracy = 0.9\nrule = 'device-only'", "only with joint.rule = 'release'"),
        ("[joint]\ndeadline_s = inf", "joint.deadline_s = inf: must be a number"),
        ("tags = [", "is not TOML"),
        ("tasks = 1", "must be a table, [tasks]"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(text: str, line: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        written(tmp_path, text)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_task_of_ones_own_lies_beside_the_file_and_is_found_without_running_it(tmp_path: Path) -> None:
    (tmp_path / "ours.py").write_text("raise SystemExit('ran')\n")
    (task,) = written(tmp_path, "[tasks.'ours:TASK']").tasks
    found = digests_of([task, OfferedTask("digits")], tmp_path)
    assert found["digits"] == task_digest("digits")
    assert re.fullmatch(r"[0-9a-f]{64}", found["ours:TASK"])


@pytest.mark.parametrize(
    ("task", "line"),
    [
        (OfferedTask("absent_module:TASK"), "there is no module 'absent_module'"),
        (OfferedTask("dgits"), "no built-in task"),
        (OfferedTask("digits", pin="ab" * 32), "is pinned; its code has changed"),
    ],
)
def test_a_task_that_is_not_here_or_not_the_pinned_one_is_refused(
    task: Any, line: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=re.escape(line)):
        digests_of([task], tmp_path)
