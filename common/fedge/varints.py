"""Numbers in groups of seven bits, least first, and what is read from bytes that may be anything."""

from __future__ import annotations

from fedge.errors import FormatError

_GROUPS = 5  # of a number: it is below 2^35


def number(value: int) -> bytes:
    """A number from 0 to 2^35 - 1; the high bit is set in all groups but the last."""
    groups = bytearray()
    while value >= 0x80:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])


class Reader:
    """Bytes, from their start to their end."""

    def __init__(self, data: bytes, what: str) -> None:
        """`what` begins the messages of errors."""
        self._data, self._at, self._what = memoryview(data), 0, what

    def take(self, length: int) -> bytes:
        """The next bytes.

        Raises:
            FormatError: there are fewer.
        """
        part = self._data[self._at : self._at + length]
        if len(part) < length:
            raise FormatError(f"{self._what} ends too soon")
        self._at += length
        return bytes(part)

    @property
    def left(self) -> int:
        """How many bytes follow."""
        return len(self._data) - self._at

    def number(self) -> int:
        """The next number.

        Raises:
            FormatError: it does not end.
        """
        value = 0
        for place in range(_GROUPS):
            (byte,) = self.take(1)
            value |= (byte & 0x7F) << 7 * place
            if byte < 0x80:
                return value
        raise FormatError(f"{self._what} has a number that is too long")
