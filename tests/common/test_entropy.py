from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge.entropy import TURNS, Decoder, _Counts, encode, lanes_for
from fedge.errors import FormatError


def decoded(stream: bytes, parts):
    decoder = Decoder(stream, sum(len(symbols) for symbols, _ in parts))
    found = [decoder.take(len(symbols), size) for symbols, size in parts]
    decoder.close()
    return found


@st.composite
def runs(draw):
    size = draw(st.integers(1, 256))
    symbols = draw(st.lists(st.integers(0, size - 1), max_size=60))
    return np.array(symbols, np.uint8), size


@given(st.lists(runs(), max_size=4))
def test_what_is_encoded_is_decoded(parts) -> None:
    for symbols, found in zip((part[0] for part in parts), decoded(encode(parts), parts), strict=True):
        np.testing.assert_array_equal(found, symbols)


def test_several_lanes_and_a_last_turn_of_fewer_give_the_symbols_back() -> None:
    rng = np.random.default_rng(0)
    parts = [(rng.integers(0, 7, n).astype(np.uint8), 7) for n in (2 * TURNS + 1, 1, 3, TURNS)]
    assert lanes_for(sum(len(symbols) for symbols, _ in parts)) == 4
    for (symbols, _), found in zip(parts, decoded(encode(parts), parts), strict=True):
        np.testing.assert_array_equal(found, symbols)


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.3, 0.4, 0.3), (0.9, 0.05, 0.05), (0.02,) * 50])
def test_a_run_takes_its_entropy_and_at_most_one_hundredth_more(shares) -> None:
    symbols = np.random.default_rng(0).choice(len(shares), 40_000, p=shares).astype(np.uint8)
    entropy = -sum(share * math.log2(share) for share in shares) * len(symbols) / 8
    size = len(encode([(symbols, len(shares))]))
    assert 0.97 * entropy < size < 1.01 * entropy + 60  # the draw's own entropy is a little off


def test_symbols_that_are_all_alike_take_next_to_nothing() -> None:
    assert len(encode([(np.zeros(100_000, np.uint8), 1)])) == 4 * lanes_for(100_000)
    assert len(encode([(np.full(TURNS - 1, 2, np.uint8), 3)])) <= 8


def test_frequencies_are_counts_plus_one_half_over_the_whole() -> None:
    counts = _Counts(3)
    assert counts.edges().tolist() == [0, 5461, 10922, 16384]  # (16384 - 3) / 3 each, plus 1
    counts.add(np.array([0, 0, 2], np.uint8))
    # Halves: 5, 1, 3 of 9. 16381 * 5 / 9 = 9100.6, * 6 / 9 = 10920.7, all = 16381; plus 1, 2, 3.
    assert counts.edges().tolist() == [0, 9101, 10922, 16384]


def test_one_symbol_of_a_half_moves_the_state_as_worked_by_hand() -> None:
    # Of two symbols, 1 has the range 8192 .. 16384: 65536 // 8192 * 16384 + 0 + 8192 = 2 * 65536 + 8192.
    assert encode([(np.array([1], np.uint8), 2)]) == b"\x02\x00\x00\x20"


@pytest.mark.slow
def test_a_stream_that_is_cut_or_longer_is_refused() -> None:
    part = (np.arange(200, dtype=np.uint8), 200)
    stream = encode([part])
    for length in range(len(stream)):
        with pytest.raises(FormatError):
            decoded(stream[:length], [part])
    with pytest.raises(FormatError, match="does not end"):
        decoded(stream + b"\x00\x00", [part])
