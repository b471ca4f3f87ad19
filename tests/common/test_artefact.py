from __future__ import annotations

import lzma
import struct
import tracemalloc
import zlib
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge.artefact import MAX_INSTALLED_BYTES, pack, unpack
from fedge.errors import FormatError

MODEL = bytes(range(256)) * 8
WIRE = pack(MODEL)


@given(st.binary(max_size=3000))
def test_what_is_packed_is_unpacked(installed: bytes) -> None:
    assert unpack(pack(installed), len(installed)) == installed


def test_the_same_bytes_pack_alike_and_repetition_gets_smaller() -> None:
    assert pack(MODEL) == WIRE
    assert len(WIRE) < len(MODEL) / 4


def test_every_truncation_is_refused() -> None:
    for length in range(len(WIRE)):
        with pytest.raises(FormatError):
            unpack(WIRE[:length], len(MODEL))


@given(st.data())
def test_flipped_bits_are_refused_or_change_nothing(data: st.DataObject) -> None:
    bad = bytearray(WIRE)
    for _ in range(data.draw(st.integers(1, 3))):
        bad[data.draw(st.integers(0, len(bad) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with suppress(FormatError):
        assert unpack(bytes(bad), len(MODEL)) == MODEL


@pytest.mark.parametrize("declared", [0, 1, len(MODEL) - 1, len(MODEL) + 1, -1, MAX_INSTALLED_BYTES + 1])
def test_another_length_than_declared_is_refused(declared: int) -> None:
    with pytest.raises(FormatError):
        unpack(WIRE, declared)


def test_a_bomb_costs_no_more_memory_than_was_declared() -> None:
    bomb = lzma.compress(bytes(30_000_000), preset=0)  # the decoder's dictionary takes 256 KiB
    assert len(bomb) < 10_000
    tracemalloc.start()
    with pytest.raises(FormatError, match="more than 1000 bytes"):
        unpack(bomb, 1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_a_dictionary_larger_than_ours_is_refused() -> None:
    greedy = bytearray(lzma.compress(MODEL, filters=[{"id": lzma.FILTER_LZMA2, "preset": 0}]))
    # The dictionary's size is one byte of the block header, which ends in a CRC: 0x28 asks for 4 GiB.
    header_size = (greedy[12] + 1) * 4
    at = greedy.index(b"\x21\x01", 12) + 2
    greedy[at] = 0x28
    greedy[12 + header_size - 4 : 12 + header_size] = struct.pack(
        "<I", zlib.crc32(greedy[12 : 12 + header_size - 4])
    )
    with pytest.raises(FormatError, match="whole xz stream"):
        unpack(bytes(greedy), len(MODEL))


@pytest.mark.parametrize(
    "wire", [b"", b"plain bytes", WIRE + b"x", WIRE + WIRE, lzma.compress(MODEL, lzma.FORMAT_ALONE)]
)
def test_other_streams_are_refused(wire: bytes) -> None:
    with pytest.raises(FormatError):
        unpack(wire, len(MODEL))
