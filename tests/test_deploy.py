"""The files that deploy hub and agent name commands, paths and extras that exist."""

from __future__ import annotations

import configparser
import re
import shlex
import shutil
import subprocess
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
UNITS = sorted([*ROOT.glob("client/systemd/*.service"), *ROOT.glob("server/systemd/*.service")])
DOCKERFILES = [ROOT / "client" / "Dockerfile", ROOT / "server" / "Dockerfile"]


def unit(path: Path) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(
        strict=False, interpolation=None, delimiters=("=",), comment_prefixes=("#",)
    )
    parser.optionxform = str  # type: ignore[assignment, method-assign]  # names are case-sensitive
    parser.read(path, "utf-8")
    return parser


def accepts(words: list[str]) -> bool:
    """Whether the command's own parser takes these words (asked for help, so that nothing is done)."""
    module, _, name = PROJECT["scripts"][Path(words[0]).name].partition(":")
    with pytest.raises(SystemExit) as ended:
        getattr(import_module(module), name)([*words[1:], "--help"])
    return ended.value.code == 0


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_a_unit_starts_a_command_that_exists(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    service = unit(path)["Service"]
    for key in ("ExecStart", "ExecStartPre"):
        if key in service:
            command = service[key].removeprefix("-").replace("%i", "micro")  # as of an instance of that name
            assert accepts(shlex.split(command)), command


def test_a_check_that_fails_does_not_keep_the_server_down() -> None:
    found = unit(ROOT / "server" / "systemd" / "fedge-server.service")
    assert found["Service"]["ExecStartPre"].startswith("-")
    assert found["Unit"]["StartLimitIntervalSec"] == "0"


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_a_unit_gives_its_process_no_privileges(path: Path) -> None:
    service = unit(path)["Service"]
    assert service["NoNewPrivileges"] == "yes"
    assert service["ProtectSystem"] == "strict"
    assert service["CapabilityBoundingSet"] == service["AmbientCapabilities"] == ""
    assert service["User"] not in ("root", "")
    assert service["StateDirectoryMode"] == "0700"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_systemd_knows_every_key_of_a_unit(path: Path) -> None:
    command = ["systemd-analyze", "verify", "--man=no", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    unknown = [
        line for line in done.stderr.splitlines() if re.search(r"Unknown|Failed to parse|Invalid", line)
    ]
    assert unknown == []


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.parent.name)
def test_a_dockerfile_copies_what_is_there_and_installs_extras_that_exist(path: Path) -> None:
    text = path.read_text("utf-8")
    for line in re.findall(r"^COPY (?!--from)(.+)$", text, re.MULTILINE):
        *sources, _ = line.split()
        assert [name for name in sources if not (ROOT / name).exists()] == []
    named = re.findall(r"EXTRAS=([\w,]+)", text) + re.findall(r"\"\.\[([\w,]+)\]\"", text)
    assert named
    assert {extra for names in named for extra in names.split(",")} <= set(PROJECT["optional-dependencies"])
    assert re.search(r"^USER (?!root)", text, re.MULTILINE)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.parent.name)
def test_commands_in_a_dockerfile_exist(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = path.read_text("utf-8")
    (entry,) = re.findall(r'^ENTRYPOINT \["/opt/fedge/bin/(fedge-\w+)"\]', text, re.MULTILINE)
    (command,) = re.findall(r'^CMD \["(\w+)"\]', text, re.MULTILINE)
    assert accepts([entry, command])
