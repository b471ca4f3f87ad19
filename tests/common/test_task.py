from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fedge.errors import ConfigError
from fedge.task import Task, resolve
from fedge.tasks import BUILT_IN, digits


def refused(name: str) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, and a module search path that is put back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_task_is_found_by_its_name_and_its_models_are_its_own(name: str) -> None:
    task = resolve(name)
    assert task.name == name
    assert task.default_model in task.models
    assert task.model("") is task.models[task.default_model]


def test_a_misspelt_task_names_the_nearest() -> None:
    assert refused("imgaes") == (
        "task = 'imgaes': no built-in task; did you mean 'images'?, or name yours package.module:TASK"
    )


def test_a_misspelt_model_names_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match=r"model.name = .cn.: task 'digits' has no such model; did you mean 'cnn'"
    ):
        digits.TASK.model("cn")


def test_a_task_needs_a_default_model_that_it_has() -> None:
    with pytest.raises(ConfigError, match="default_model 'x' is not among its models: none"):
        Task(name="t", read=digits.read, models={}, default_model="x", students={})


def test_a_module_in_the_current_folder_is_found(here: Path) -> None:
    (here / "resolved_alone.py").write_text("from fedge.tasks.digits import TASK\nMINE = TASK\n")
    assert resolve("resolved_alone:MINE") is digits.TASK


def test_a_module_in_a_package_is_found(here: Path) -> None:
    (here / "resolved_pack").mkdir()
    (here / "resolved_pack" / "deep.py").write_text("from fedge.tasks.digits import TASK\n")
    assert resolve("resolved_pack.deep:TASK") is digits.TASK


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("", "AttributeError: module 'MODULE' has no attribute 'TASK'"),
        ("TASK = 5", "is a int, not a fedge.Task"),
        ("from fedge.task import Task as TASK", "is a type, not a fedge.Task"),
        ("import nowhere_at_all", "ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("def (", "SyntaxError: invalid syntax"),
        ("TASK = undefined", "NameError: name 'undefined' is not defined"),
        ("raise RuntimeError('first\\nsecond')", "RuntimeError: first)"),
        ("raise RuntimeError", "RuntimeError: no message"),
    ],
)
def test_a_module_that_cannot_be_used_is_one_line(here: Path, content: str, line: str) -> None:
    module = f"broken_{abs(hash(content))}"
    (here / f"{module}.py").write_text(content)
    assert line.replace("MODULE", module) in refused(f"{module}:TASK")


@pytest.mark.parametrize(
    "name", ["nowhere_at_all:TASK", ":TASK", "json:", "..up:TASK", "json:a:b", "a b:TASK"]
)
def test_a_malformed_name_is_one_line(name: str) -> None:
    assert refused(name).startswith(f"task = {name!r}: cannot be loaded (")


@pytest.mark.slow
def test_a_task_can_be_described_without_torch() -> None:
    code = (
        "import sys; from fedge import Task, Dataset, Config; "
        "Task(name='t', read=print, models={'m': print}, default_model='m', students={}); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
