"""Symbols at the size of their entropy: asymmetric numeral systems over counts that adapt (Duda 2014).

"Asymmetric numeral systems: entropy coding combining speed of Huffman coding with compression rate of
arithmetic coding", arXiv:1311.2540, in its range variant, interleaved as in Giesen 2014 ("Interleaved entropy
coders", arXiv:1402.3392): L lanes, each a state of 32 bits, take turns, so that numpy decodes L symbols at a
time. Before each turn the frequencies are those of all symbols so far, plus one half each (Krichevsky and
Trofimov 1981); nobody has to send a table.

The stream is of 16-bit words, little-endian: each lane's first state, high word first, then the words that
lanes take in when their state falls below 2^16, in the order in which they do. At the end every state is 2^16
and no word is left.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fedge.errors import FormatError

TURNS = 4096  # about; the lanes are as many as it takes
_PRECISION = 14  # bits of a frequency
_WHOLE = 1 << _PRECISION
_LEAST = 1 << 16  # of a state
MAX_ALPHABET = 256

Symbols = npt.NDArray[np.uint8]
_Words = npt.NDArray[np.uint64]


def lanes_for(symbols: int) -> int:
    """How many lanes code so many symbols."""
    return symbols // TURNS + 1


def encode(parts: Sequence[tuple[Symbols, int]]) -> bytes:
    """Runs of symbols, each with its own alphabet size (symbols 0 .. size - 1) and its own counts."""
    lanes = lanes_for(sum(len(symbols) for symbols, _ in parts))
    states = np.full(lanes, _LEAST, np.uint64)
    words: list[npt.NDArray[np.uint16]] = []  # last first
    turns = [turn for symbols, size in parts for turn in _turns(symbols, size, lanes)]
    for low, width in reversed(turns):
        state = states[: len(low)]
        full = state >= width << np.uint64(32 - _PRECISION)
        words.append(state[full].astype(np.uint16)[::-1])
        state[full] >>= np.uint64(16)
        states[: len(low)] = (state // width << np.uint64(_PRECISION)) + state % width + low
    first = np.stack([states >> np.uint64(16), states & np.uint64(0xFFFF)], axis=1).reshape(-1)
    rest = np.concatenate([*words, np.zeros(0, np.uint16)])[::-1]
    return first.astype("<u2").tobytes() + rest.astype("<u2").tobytes()


def _turns(symbols: Symbols, size: int, lanes: int) -> list[tuple[_Words, _Words]]:
    """Where each symbol's share of the range begins and how wide it is, a turn at a time."""
    counts, turns = _Counts(size), []
    for start in range(0, len(symbols), lanes):
        chosen = symbols[start : start + lanes]
        edges = counts.edges()
        turns.append((edges[chosen], edges[chosen.astype(np.intp) + 1] - edges[chosen]))
        counts.add(chosen)
    return turns


class Decoder:
    """Reads runs of symbols from a stream that may be anything; a wrong one ends in an error, or in noise."""

    def __init__(self, stream: bytes, symbols: int) -> None:
        """Begin a stream that holds `symbols` symbols in all.

        Raises:
            FormatError: it is too short, or of an odd length.
        """
        lanes = lanes_for(symbols)
        if len(stream) % 2 or len(stream) < 4 * lanes:
            raise FormatError(f"packed: {len(stream)} bytes are no stream of {lanes} lanes")
        words = np.frombuffer(stream, "<u2")
        first = words[: 2 * lanes].astype(np.uint64).reshape(lanes, 2)
        self._states = first[:, 0] << np.uint64(16) | first[:, 1]
        self._words, self._at = words, 2 * lanes

    def take(self, length: int, size: int) -> Symbols:
        """The next run: so many symbols of an alphabet of this size, 1 to `MAX_ALPHABET`.

        Raises:
            FormatError: the stream ends before.
        """
        result, counts = np.empty(length, np.uint8), _Counts(size)
        for start in range(0, length, len(self._states)):
            chosen = result[start : start + len(self._states)]
            edges = counts.edges()
            state = self._states[: len(chosen)]
            slot = state & np.uint64(_WHOLE - 1)
            found = edges.searchsorted(slot, "right") - 1
            chosen[:] = found
            low = edges[found]
            state[:] = (edges[found + 1] - low) * (state >> np.uint64(_PRECISION)) + slot - low
            self._refill(state)
            counts.add(chosen)
        return result

    def _refill(self, state: _Words) -> None:
        empty = np.flatnonzero(state < _LEAST)
        if len(empty):
            words = self._words[self._at : self._at + len(empty)]
            if len(words) < len(empty):
                raise FormatError("packed: the stream of codes is truncated")
            state[empty] = state[empty] << np.uint64(16) | words
            self._at += len(empty)

    def close(self) -> None:
        """Check that everything was read.

        Raises:
            FormatError: words are left, or a state is not the one that encoding begins with.
        """
        if self._at != len(self._words) or (self._states != _LEAST).any():
            raise FormatError("packed: the stream of codes does not end where it must")


class _Counts:
    """How often each symbol has been seen, in halves."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._counts = np.ones(size, np.uint64)
        self._edges = np.zeros(size + 1, np.uint64)
        self._least = np.arange(1, size + 1, dtype=np.uint64)  # every symbol can always be coded

    def edges(self) -> _Words:
        """The range 0 .. 2^14 cut into one part for each symbol; valid until the next call."""
        sums = self._counts.cumsum()
        self._edges[1:] = sums * np.uint64(_WHOLE - self._size) // sums[-1] + self._least
        return self._edges

    def add(self, symbols: Symbols) -> None:
        """Count these."""
        self._counts += np.bincount(symbols, minlength=self._size).astype(np.uint64) * np.uint64(2)
