"""The bytes of a variant on the network and installed (ONNX), with a decoder that cannot be bombed.

On the network they are in the packed layout (`fedge.packed`), or one xz stream where that is smaller; the
first bytes tell which.
"""

from __future__ import annotations

import lzma

from fedge import packed
from fedge.errors import FormatError

MAX_INSTALLED_BYTES = 2 * 1024**3 - 1  # protobuf's own limit for an ONNX file
_DICTIONARY_BYTES = 8 * 1024**2
_MEMORY_BYTES = 64 * 1024**2  # decoder memory beyond its output: dictionary and tables


def pack(installed: bytes) -> bytes:
    """The installed bytes as they travel, in the smaller of the two forms."""
    return min(packed.pack(installed), _in_xz(installed), key=len)


def unpack(wire: bytes, installed_bytes: int) -> bytes:
    """Undo `pack`; the result has exactly `installed_bytes` bytes, and no more of it is ever made.

    Raises:
        FormatError: truncated, damaged, trailing bytes, or another length than declared.
    """
    if not 0 <= installed_bytes <= MAX_INSTALLED_BYTES:
        raise FormatError(f"artefact: declared length {installed_bytes} is out of range")
    if packed.is_packed(wire):
        return packed.unpack(wire, installed_bytes)
    return _from_xz(wire, installed_bytes)


def _in_xz(installed: bytes) -> bytes:
    """One xz stream with a CRC64 (our own SHA-256 is in the manifest)."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": _DICTIONARY_BYTES}]
    return lzma.compress(installed, format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC64, filters=filters)


def _from_xz(wire: bytes, installed_bytes: int) -> bytes:
    decoder = lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=_MEMORY_BYTES)
    try:
        installed = decoder.decompress(wire, max_length=installed_bytes + 1)
    except (lzma.LZMAError, EOFError) as error:
        raise FormatError(f"artefact: not a whole xz stream ({error})") from error
    if len(installed) != installed_bytes or not decoder.eof or decoder.unused_data:
        raise FormatError(
            f"artefact: unpacks to {'more than ' if len(installed) > installed_bytes else ''}"
            f"{min(len(installed), installed_bytes)} bytes, not to the {installed_bytes} declared, "
            "or is followed by other bytes"
        )
    return installed
