"""The training process: loads torch and Flower once, then runs the ClientApp for one message after the other.

`python -m fedge_client.agent.training HOME FD ...`, started by the agent and ended with it. It opens no
network connection; it reads this device's own data and the object file that it is given.
"""

from __future__ import annotations

import json
import signal
import socket
import sys
import time
from pathlib import Path
from types import FrameType

from fedge_client.agent import answering, frames
from fedge_client.agent.answering import Answer
from fedge_client.agent.frames import Job
from fedge_client.agent.limits import limit


class Cancelled(BaseException):
    """Raised between two operations of the work under way; no `except Exception` holds it up."""


class _Switch:
    """Turns SIGUSR1 into Cancelled while there is work, and into nothing otherwise."""

    def __init__(self) -> None:
        self.working = False
        signal.signal(signal.SIGUSR1, self._raise)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        if self.working:
            self.working = False
            raise Cancelled


def main() -> int:
    """Serve jobs until the agent closes the socket."""
    home = sys.argv[1]
    descriptor, parent, memory, threads, nice = (int(value) for value in sys.argv[2:7])
    sys.path.append(home)  # modules of the device's own tasks may lie there; they hide no installed one
    switch = _Switch()
    limit(parent, memory, nice)
    answer = _loaded(threads, Path(home))
    with socket.socket(fileno=descriptor) as agent:
        while (frame := _received(agent)) is not None:
            agent.sendall(frames.result_frame(_result(switch, answer, *frame)))
    return 0


def _loaded(threads: int, home: Path) -> Answer:
    """What answers jobs; where torch or Flower cannot be loaded, that answer says so."""
    try:
        return answering.load(threads, home)
    except Exception as error:  # noqa: BLE001 - whatever a broken installation raises
        reason = f"training process: cannot load torch and Flower ({type(error).__name__}: {error})"
        return lambda job, work: answering.failure(reason)


def _received(agent: socket.socket) -> tuple[Job, bytes] | None:
    """The next job and its Work; None when the agent has closed the socket."""
    head = _exactly(agent, frames.HEAD.size)
    if head is None:
        return None
    of_json, of_body = frames.lengths(head)
    text, body = _exactly(agent, of_json), _exactly(agent, of_body)
    return None if text is None or body is None else (Job(**json.loads(text)), body)


def _exactly(agent: socket.socket, count: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < count:
        part = agent.recv(count - len(parts))
        if not part:
            return None
        parts += part
    return bytes(parts)


def _result(switch: _Switch, answer: Answer, job: Job, work: bytes) -> bytes:
    started = time.monotonic()
    try:
        switch.working = True
        result = answer(job, work)
        switch.working = False
    except Cancelled:
        result = answering.failure("cancelled")
    except Exception as error:  # noqa: BLE001 - a task may be anyone's code; its failure is the answer
        result = answering.failure(answering.reason_of(error))
    finally:
        switch.working = False
    if result.HasField("failure"):
        _empty(Path(job.answer))
    result.seconds = time.monotonic() - started
    return bytes(result.SerializeToString())


def _empty(folder: Path) -> None:
    for path in folder.glob("*") if folder.is_dir() else ():
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    raise SystemExit(main())
