"""The project's own commands as processes of their own, as they run on a server or a device."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from fedge.errors import FedgeError

Package = Literal["fedge_client", "fedge_server"]

TIMEOUT_S = 300.0  # of a command that does one thing
_STOP_S = 20.0  # a service gets so long to end by itself


def command(package: Package, *arguments: str) -> list[str]:
    """The command line that runs `fedge-client` or `fedge-server` with this interpreter."""
    return [sys.executable, "-m", package, *arguments]


def environment() -> dict[str, str]:
    """This process's environment with its module path, for commands that are not installed."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def completed(package: Package, *arguments: str, name: str, timeout_s: float = TIMEOUT_S) -> str:
    """Run a command to its end and return what it printed.

    Args:
        package: whose command.
        arguments: its words.
        name: what a failure is called after.
        timeout_s: wall seconds after which it is killed.

    Raises:
        FedgeError: it failed, or did not end in time.
    """
    try:
        done = subprocess.run(
            command(package, *arguments),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            env=environment(),
        )
    except subprocess.TimeoutExpired as error:
        raise FedgeError(f"{name}: {arguments[0]} did not end within {timeout_s:.0f} s") from error
    if done.returncode != 0:
        raise FedgeError(f"{name}: {arguments[0]} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def lines(package: Package, *arguments: str, name: str) -> Iterator[str]:
    """Run a command and iterate over the lines it prints, as they come.

    Raises:
        FedgeError: it failed; the message has its last line on stderr.
    """
    with subprocess.Popen(
        command(package, *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
    ) as process:
        try:
            assert process.stdout is not None  # noqa: S101 - it is a pipe
            last = ""
            for line in process.stdout:
                last = line.rstrip("\n")
                yield last
        finally:
            stop(process)
    if process.returncode != 0:
        raise FedgeError(f"{name}: {' '.join(arguments[:2])} failed: {last}")


@contextmanager
def service(package: Package, *arguments: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A command that runs until the block ends; its output goes to `log`."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            command(package, *arguments), stdout=output, stderr=subprocess.STDOUT, env=environment()
        )
    try:
        yield process
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes] | subprocess.Popen[str]) -> None:
    """End a process: SIGTERM, and SIGKILL when that does not help."""
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def wait_until(ready: Callable[[], bool], process: subprocess.Popen[bytes], log: Path, what: str) -> None:
    """Wait until a service is ready.

    Raises:
        FedgeError: it ended before, or was not ready within a minute.
    """
    end = time.monotonic() + 60
    while not ready():
        if process.poll() is not None or time.monotonic() > end:
            tail = log.read_text("utf-8", "replace").strip().splitlines()[-1:] if log.exists() else []
            raise FedgeError(f"{what}: did not start ({tail[0] if tail else 'it said nothing'}); see {log}")
        time.sleep(0.05)
