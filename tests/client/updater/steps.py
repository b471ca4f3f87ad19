"""Kill a process at each step of the file system in turn; for scripts of processes of their own."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

_STEPS = (
    *((os, name) for name in ("fsync", "replace", "mkdir", "unlink", "fdopen", "rmdir", "chmod", "symlink")),
    (tempfile, "mkstemp"),
)
_KILLED = 9


def killed_at_each(home: Path, copies: Path, work: Callable[[Path], object]) -> Iterator[Path]:
    """A copy of the folder for each step, in which the work was killed there; in the last one it was done."""
    step, code = 0, _KILLED
    while code == _KILLED:
        step += 1
        place = copies / str(step)
        shutil.copytree(home, place, symlinks=True)
        child = os.fork()
        if child == 0:
            _killed_at(step, place, work)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, _KILLED), f"step {step}: the work failed"
        yield place


def _killed_at(step: int, place: Path, work: Callable[[Path], object]) -> NoReturn:
    count, code = 0, 1

    def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == step:
                os._exit(_KILLED)
            return function(*arguments, **options)

        return call

    for module, name in _STEPS:
        setattr(module, name, wrapped(getattr(module, name)))
    try:
        work(place)
        code = 0
    finally:
        os._exit(code)
