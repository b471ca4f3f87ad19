"""From a Work to a Result: the ClientApp, its context, and the state that a run keeps on this device."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Final

from fedge.wire.v1.link_pb2 import Work
from fedge.wire.v1.records_pb2 import Failure, Result
from fedge_client.agent.frames import Job

Answer = Callable[[Job, bytes], Result]
"""The Result of a job and its serialised Work."""

# Flower's codes (flwr.common.constant.ErrorCode), which the agent must not load.
LOAD_FAILED: Final = 1
APP_FAILED: Final = 2
MAX_REASON: Final = 1000  # characters

_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "Cannot allocate memory")


def failure(reason: str, code: int = APP_FAILED) -> Result:
    """A Result that says why there is no answer."""
    line = " ".join(reason.split())
    return Result(failure=Failure(code=code, reason=line[:MAX_REASON]))


def reason_of(error: Exception) -> str:
    """One line for what an app or a task raised."""
    text = str(error)
    if isinstance(error, MemoryError) or any(part in text for part in _OUT_OF_MEMORY):
        return (
            "out of memory: the message needs more than training.max_memory_bytes of this device "
            f"({type(error).__name__})"
        )
    return f"{type(error).__name__}: {text}"


def load(threads: int, home: Path) -> Answer:
    """Load torch, Flower and the ClientApp; what answers jobs with them.

    Args:
        threads: that torch may use.
        home: of the device, whose identity signs the keys of its masks.
    """
    import torch

    torch.set_num_threads(threads)
    from flwr.app import Context, Message
    from flwr.supercore.task_identity import TaskIdentity

    from fedge.errors import FormatError
    from fedge.wire.records import pack, unpack, write_object
    from fedge_client.agent import state
    from fedge_client.agent.signing import DeviceSigner
    from fedge_client.app import build, own_share

    app = build(own_share, signer=lambda: DeviceSigner.of(home))

    def answer(job: Job, serialised: bytes) -> Result:
        work = Work.FromString(serialised)
        run = run_number(work.run_id)
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run, 1, 1
        records = unpack(work.content, Path(job.object) if job.object else None)
        message = Message(
            records,
            work.node_id,
            work.message_type,
            ttl=max(work.seconds_left, 1.0),
            group_id=work.group_id,
        )
        folder = Path(job.state)
        context = Context(run, work.node_id, dict(job.node), state.before(folder, work.message_id), {})
        reply = app(message, context)
        if not reply.has_content():
            raise FormatError(reply.error.reason or "the app answered with an error")
        packed = pack(reply.content)
        write_object(Path(job.answer), packed)
        state.after(folder, work.message_id, context.state)
        return Result(content=packed.content)

    return answer


def run_number(run_id: str) -> int:
    """Flower's number for a run: 63 bits of the hash of its id."""
    return int.from_bytes(hashlib.sha256(run_id.encode()).digest()[:8], "big") >> 1
