"""What a service tells the service manager that started it."""

from __future__ import annotations

import os
import socket
from contextlib import suppress


def tell_systemd(state: str) -> None:
    """Tell the service manager, if there is one that wants to know (sd_notify)."""
    name = os.environ.get("NOTIFY_SOCKET")
    if not name:
        return
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.connect("\0" + name[1:] if name.startswith("@") else name)
        channel.send(state.encode())
