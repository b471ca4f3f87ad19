"""A task's digest names what it means, without running its module."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fedge.errors import ConfigError
from fedge.task_digest import REVISIONS, task_digest
from fedge.tasks import BUILT_IN


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    return tmp_path


def test_every_built_in_task_has_a_revision_and_a_digest_of_its_own() -> None:
    assert set(REVISIONS) == set(BUILT_IN)
    assert len({task_digest(name) for name in BUILT_IN}) == len(BUILT_IN)


def test_the_digest_changes_with_the_source_and_the_attribute_and_runs_nothing(here: Path) -> None:
    module = here / "digest_mine.py"
    module.write_text("raise SystemExit('this must not run')\n")
    first = task_digest("digest_mine:TASK")
    assert first == task_digest("digest_mine:TASK") != task_digest("digest_mine:OTHER")
    module.write_text("raise SystemExit('nor must this')\n")
    assert task_digest("digest_mine:TASK") != first
    assert "digest_mine" not in sys.modules


def test_a_package_is_digested_with_all_its_files(here: Path) -> None:
    (here / "digest_package" / "inner").mkdir(parents=True)
    (here / "digest_package" / "__init__.py").write_text("")
    helper = here / "digest_package" / "inner" / "models.py"
    helper.write_text("WIDTH = 3\n")
    first = task_digest("digest_package:TASK")
    helper.write_text("WIDTH = 4\n")
    second = task_digest("digest_package:TASK")
    helper.rename(helper.with_name("renamed.py"))
    assert len({first, second, task_digest("digest_package:TASK")}) == 3


@pytest.mark.parametrize(
    "name", ["digit", "no_such_module_here:TASK", "no.such.package:TASK", "sys:TASK", ":TASK"]
)
def test_what_is_not_there_is_refused_by_name(here: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="task = "):
        task_digest(name)
