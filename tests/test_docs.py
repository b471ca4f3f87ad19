"""What the documents show is run: Python blocks, configurations, and the commands' names and options.

A block is left out by `no-test` after its language.
"""

from __future__ import annotations

import importlib
import io
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

import pytest

from fedge.config import Config

ROOT = Path(__file__).parents[1]
SOURCES = [ROOT / name for name in ("common", "server", "client", "simulations")]
SLOW = {
    "README.md",
    "docs/algorithms.md",
    "docs/compression.md",
    "docs/data.md",
    "docs/distribution.md",
    "docs/learning.md",
    "docs/privacy-attacks.md",
    "docs/repository.md",
    "docs/rollout.md",
    "docs/signer.md",
    "docs/simulation.md",
    "docs/tasks.md",
    "docs/telemetry.md",
}  # whose blocks import torch, train, or take long
COMMANDS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["scripts"]
CONFIG_KEYS = {field.name for field in fields(Config)}


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: its language, its first line in the file (from 1), its text."""

    language: str
    line: int
    text: str


def blocks(text: str, *languages: str) -> Iterator[Block]:
    """The blocks of these languages that are to be tested."""
    for found in re.finditer(r"^```([^\n]*)\n(.*?)^```\s*$", text, re.MULTILINE | re.DOTALL):
        language, *words = found[1].split() or [""]
        if language in languages and "no-test" not in words:
            yield Block(language, text.count("\n", 0, found.start(2)) + 1, found[2])


def script(text: str) -> str:
    """All Python blocks as one script whose line numbers are the document's."""
    lines: list[str] = []
    for block in blocks(text, "python"):
        lines += [""] * (block.line - 1 - len(lines)) + block.text.splitlines()
    return "\n".join(lines) + "\n"


def command_lines(text: str) -> Iterator[tuple[int, list[str]]]:
    """Line number and words of each call of a command of ours, without what the shell does with it."""
    for block in blocks(text, "console", "sh"):
        number = block.line
        for line in block.text.replace("\\\n", "\0").splitlines():  # one call over several lines
            call = line.replace("\0", " ").removeprefix("$ ").strip()
            words = shlex.split(call, comments=True) if "fedge-" in call else []
            if words and words[0] in COMMANDS:
                shell = (i for i, word in enumerate(words) if re.fullmatch(r"[|;&<>]+|\d?>+.*", word))
                yield number, words[: next(shell, len(words))]
            number += 1 + line.count("\0")


@cache
def help_of(command: str, *words: str) -> str | None:
    """The --help of a command or subcommand, or None when there is no such one."""
    module, _, name = COMMANDS[command].partition(":")
    shown = io.StringIO()
    with redirect_stdout(shown), redirect_stderr(io.StringIO()):
        try:
            getattr(importlib.import_module(module), name)([*words, "--help"])
        except SystemExit as end:
            return shown.getvalue() if end.code in (0, None) else None
    return None


def fault(words: list[str]) -> str | None:
    """What the command's own help does not know of a call."""
    command, *rest = words
    path: list[str] = []
    for word in rest:
        if word.startswith("-"):
            if path:
                break
        elif help_of(command, *path, word) is not None:
            path.append(word)
        elif path:
            break
    shown = (help_of(command) or "") + (help_of(command, *path) or "")
    options = {word.partition("=")[0] for word in rest if re.match(r"--?[a-z]", word)}
    if not path and not options & {"--help", "--version", "-h"}:
        return f"{' '.join(words)}: no such subcommand"
    unknown = [option for option in options if not re.search(rf"(?<![\w-]){option}(?![\w-])", shown)]
    return f"{' '.join(words)}: {unknown[0]} is not in its --help" if unknown else None


DOCUMENTS = sorted(
    str(path.relative_to(ROOT))
    for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    if path.exists()
)


def marked(names: list[str]) -> list[object]:
    return [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in names]


def with_block(*languages: str) -> list[str]:
    return [n for n in DOCUMENTS if any(blocks((ROOT / n).read_text("utf-8"), *languages))]


@pytest.mark.parametrize("name", marked(with_block("python")))
def test_the_python_blocks_of_a_document_run_from_top_to_bottom(name: str, tmp_path: Path) -> None:
    (tmp_path / "blocks.py").write_text(script((ROOT / name).read_text("utf-8")), "utf-8")
    done = subprocess.run(
        [sys.executable, "blocks.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ":".join(map(str, SOURCES)), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{name} (line numbers are the document's):\n{done.stderr[-3000:]}"


@pytest.mark.parametrize("name", with_block("toml"))
def test_the_configurations_of_a_document_load(name: str) -> None:
    for block in blocks((ROOT / name).read_text("utf-8"), "toml"):
        values = tomllib.loads(block.text)
        if CONFIG_KEYS & set(values):
            Config.from_mapping(values)


@pytest.mark.parametrize("name", with_block("console", "sh"))
def test_the_commands_of_a_document_exist_with_their_options(name: str) -> None:
    calls = command_lines((ROOT / name).read_text("utf-8"))
    faults = [f"{name}:{line}: {wrong}" for line, words in calls if (wrong := fault(words))]
    assert faults == []


def test_every_message_that_the_page_on_data_explains_is_one_that_is_given() -> None:
    code = "".join(path.read_text("utf-8") for folder in SOURCES for path in folder.rglob("*.py"))
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # a message over several lines
    table = (ROOT / "docs/data.md").read_text("utf-8").partition("| message | what to do |")[2]
    shown = [
        text for line in table.splitlines() for text in re.findall(r"`([^`]+)`", line.partition(" | ")[0])
    ]
    fragments = [part.strip("[]. ;") for text in shown for part in text.split("...")]
    assert len(shown) > 30
    assert [part for part in fragments if part not in code] == []


def test_there_are_documents_to_test() -> None:
    assert "docs/configuration.md" in DOCUMENTS
    assert len(with_block("python")) >= 3


SAMPLE = """\
text

```python
a = 1
```
```python no-test
raise SystemExit
```
```toml
seed = 3
```

```python
assert a == 1
```
```console
$ pip install fedge-client
$ fedge-sim run mine.toml --set a.b=1 \\
    --out out | tee log  # and so on
fedge-sim demo
```
"""


def test_a_script_keeps_order_and_line_numbers_and_leaves_out_what_is_marked() -> None:
    lines = script(SAMPLE).splitlines()
    assert [(i, line) for i, line in enumerate(lines, start=1) if line] == [
        (4, "a = 1"),
        (14, "assert a == 1"),
    ]


def test_calls_are_found_in_console_blocks_without_what_the_shell_does() -> None:
    assert list(command_lines(SAMPLE)) == [
        (18, ["fedge-sim", "run", "mine.toml", "--set", "a.b=1", "--out", "out"]),
        (20, ["fedge-sim", "demo"]),
    ]


@pytest.mark.parametrize(
    ("call", "wrong"),
    [
        ("fedge-sim run mine.toml --set a.b=1 --out out", None),
        ("fedge-sim --version", None),
        ("fedge-sim dmeo", "no such subcommand"),
        ("fedge-sim", "no such subcommand"),
        ("fedge-sim demo --outt x", "--outt is not in its --help"),
        ("fedge-client install /mnt/published --tier micro --root 1.root.json", None),
    ],
)
def test_a_call_is_held_against_the_commands_own_help(call: str, wrong: str | None) -> None:
    found = fault(call.split())
    assert found is None if wrong is None else wrong in str(found)
