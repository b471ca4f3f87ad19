"""A lock file has one holder, and asking about it disturbs nobody."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedge.errors import FormatError
from fedge.files import is_held, read_bounded, sole_holder, write_atomically

HOLDER = """
import sys
from pathlib import Path
from fedge.files import sole_holder
with sole_holder(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_process_holds_a_lock_until_it_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert not is_held(path)
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": str(Path(__file__).parents[2] / "common")},
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        assert is_held(path)
        with pytest.raises(BlockingIOError), sole_holder(path, patience_s=0.05):
            pass
        other.kill()
    assert not is_held(path)
    with sole_holder(path):
        assert is_held(path)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FormatError, match="regular file"):
        read_bounded(tmp_path / "pipe", 100)


def test_a_file_that_may_not_be_replaced_stays(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old", replace=False)
    with pytest.raises(FileExistsError):
        write_atomically(path, b"new", replace=False)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
