"""Bounds of a process that the agent has started, set by that process before it loads anything heavy."""

from __future__ import annotations

import ctypes
import os
import resource
import signal

_PR_SET_PDEATHSIG = 1


def limit(parent: int, memory: int, nice: int) -> None:
    """Bound this process, and end it with the agent, also while it works.

    Args:
        parent: process id of the agent.
        memory: bytes of the data segment; 0: no limit.
        nice: added to its niceness.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the agent ended before the line above
        raise SystemExit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the agent
    if memory:
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would hold the device's data
    os.nice(nice)
