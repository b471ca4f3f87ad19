"""The processes of a pretraining: started together by torch's elastic launcher (torchrun), on one machine.

This process is the launcher. They find each other at a port that the system chose, on the loopback interface;
when one dies the others are ended, and when this one dies all are.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from fedge.errors import FedgeError
from fedge_server.pretraining.preparing import Prepared

_WORKER: Final = "fedge_server.pretraining.worker"
_ONWARD: Final = "what is committed stays, and the same command goes on from there"


def launch(prepared: Prepared, processes: int, device: str, *, quiet: bool) -> None:
    """Train with so many processes until the run is over.

    Raises:
        FedgeError: one of them failed, or was killed; the line says which, and why if it could tell.
    """
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=secrets.token_hex(8),
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
    )
    words = [str(prepared.folder.absolute()), prepared.run_id, device, str(os.getpid())]
    arguments = ["-P", "-m", _WORKER, *words, "quiet" if quiet else "loud"]
    path = os.pathsep.join(entry for entry in sys.path if entry)
    with (
        _environment({"PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo", "TORCH_CPP_LOG_LEVEL": "ERROR"}),
        _silent(),
    ):
        try:
            with _handlers_kept():
                elastic_launch(config, sys.executable)(*arguments)
        except ChildFailedError as error:
            raise FedgeError(_reason(error.failures, processes)) from error
        except SignalException as error:
            raise KeyboardInterrupt from error


def _reason(failures: Mapping[int, ProcessFailure], processes: int) -> str:
    """Whoever was killed, else whoever said why: the others only lost them, or the launcher ended them."""

    def order(item: tuple[int, ProcessFailure]) -> tuple[bool, bool, int, int]:
        rank, failure = item
        code = failure.exitcode
        return (
            code >= 0,
            code == -signal.SIGTERM,
            failure.timestamp,
            rank,
        )  # SIGTERM is what the launcher sends

    rank, failure = min(failures.items(), key=order)
    if failure.exitcode < 0:
        name = failure.signal_name()
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return f"pretrain: process {rank} of {processes} was ended by {name}{hint}; {_ONWARD}"
    said = failure.error_file_data.get("message")
    text = str(said.get("message", "")) if isinstance(said, dict) else ""
    kind, _, message = text.partition(": ")
    if not message:
        return f"pretrain: process {rank} of {processes} ended with exit code {failure.exitcode}; {_ONWARD}"
    return f"pretrain: {message if kind.endswith('Error') else text}; {_ONWARD}"


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """The processes inherit these; what the user has set himself stays, but for the module path."""
    before = dict(os.environ)
    os.environ.update({k: v for k, v in values.items() if k == "PYTHONPATH" or k not in before})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """The launcher takes over signals, and does not give them back."""
    taken = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.getsignal(number) for number in taken}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _silent() -> Iterator[None]:
    """The launcher's own log repeats what the error says."""
    logger = logging.getLogger("torch.distributed.elastic")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
