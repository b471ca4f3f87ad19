"""A delta made in a process of its own: `python -m fedge.delta_process`, two files in, the delta out.

Each file is framed by its length as it travels and the length that it unpacks to.
"""

from __future__ import annotations

import os
import struct
import sys
from typing import BinaryIO, Final

from fedge import delta
from fedge.artefact import unpack
from fedge.errors import FedgeError

_FRAME: Final = struct.Struct("<QQ")
_NICE: Final = 5  # whoever waits for it can wait


def framed(wire: bytes, installed_bytes: int) -> bytes:
    """A file as the process reads it."""
    return _FRAME.pack(len(wire), installed_bytes) + wire


def _read(source: BinaryIO) -> bytes:
    length, installed_bytes = _FRAME.unpack(source.read(_FRAME.size))
    return unpack(source.read(length), installed_bytes)


def main() -> int:
    """Read base and new file from standard input, write the delta to standard output."""
    os.nice(_NICE)
    try:
        base, new = _read(sys.stdin.buffer), _read(sys.stdin.buffer)
        sys.stdout.buffer.write(delta.make(base, new))
    except FedgeError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
