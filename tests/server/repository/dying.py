"""Work that ends just before one of its changes of the disk."""

from __future__ import annotations

import os
from collections.abc import Callable

CALLS = ("fsync", "replace", "link", "unlink", "mkdir")


def dies_at(point: int, work: Callable[[], object]) -> bool:
    """Run `work` in a process that ends just before its nth change of the disk; False: it needs fewer."""
    pid = os.fork()
    if pid == 0:
        left = [point]

        def counted(call: Callable[..., object]) -> Callable[..., object]:
            def run(*args: object, **options: object) -> object:
                left[0] -= 1
                if left[0] < 0:
                    os._exit(9)
                return call(*args, **options)

            return run

        for name in CALLS:
            setattr(os, name, counted(getattr(os, name)))
        try:
            work()
        except BaseException:  # noqa: BLE001 - the process must end here
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, 9)
    return code == 9
