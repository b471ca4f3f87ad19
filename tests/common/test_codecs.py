"""Codecs: numbers worked by hand, round trips, the sum that error feedback keeps, and bytes that are none."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedge.codecs import positions, stages
from fedge.codecs.chain import Codec
from fedge.codecs.layout import Layout
from fedge.codecs.update import decode, encode, estimated_bytes, most_bytes
from fedge.errors import FormatError

CHAINS = [
    ("int8",),
    ("sign",),
    ("topk:0.1",),
    ("randomk:0.1",),
    ("topk:0.1", "int8"),
    ("topk:0.1", "sign"),
    ("randomk:0.1", "int8"),
    ("randomk:0.1", "sign"),
]


def model(rows: int = 30, seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    """Weights, a bias, a buffer of whole numbers' floats, and an fp16 layer."""
    rng = np.random.default_rng(seed)
    return {
        "w": rng.standard_normal((rows, 7)).astype(np.float32),
        "b": rng.standard_normal(7).astype(np.float32),
        "count": np.array([[3.0, 5.0]], np.float64),  # a buffer: not among the parameters
        "half": rng.standard_normal((4, 5)).astype(np.float16),
    }


def layout(rows: int = 30) -> Layout:
    return Layout.of(model(rows), {"w", "b", "half"})


def change_of(arrays: Any, where: Layout) -> np.ndarray[Any, Any]:
    return np.concatenate(
        [(arrays[n].astype(np.float64) - v).ravel() for n, v in where.origin.items() if n in where.coded]
    )


# --- what a codec is ---


@pytest.mark.parametrize("stages_", CHAINS)
def test_a_codec_is_read_again_from_its_text(stages_: tuple[str, ...]) -> None:
    codec = Codec.of(stages_)
    assert codec.text == "+".join(stages_)
    assert Codec.parse(codec.text) == codec


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ((), "does nothing"),
        (("int8", "topk:0.1"), "'topk:0.1' cannot stand there"),
        (("topk:0.1", "topk:0.1"), "cannot stand there"),
        (("int8", "sign"), "'sign' cannot stand there"),
        (("topk",), "'topk' cannot stand there"),
        (("topk:0",), "a share of 0 must be"),
        (("topk:1.5",), "a share of 1.5 must be"),
        (("zstd",), "'zstd' cannot stand there"),
    ],
)
def test_what_is_no_codec_is_refused_with_what_would_be(wrong: tuple[str, ...], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Codec.of(wrong)


def test_bytes_alone_keep_nothing_behind() -> None:
    assert not Codec.of(["int8"]).remembers
    assert Codec.of(["sign"]).remembers
    assert Codec.of(["topk:0.1", "int8"]).remembers
    assert not Codec.of(["topk:0.1", "int8"], feedback=False).remembers


# --- numbers worked by hand ---


def test_bytes_are_steps_of_a_127th_of_the_largest() -> None:
    values = np.array([1.27, -0.5, 0.004, 0.0], np.float32)
    data = stages.written(values, Codec.of(["int8"]))
    assert np.frombuffer(data, "<f4", 1)[0] == pytest.approx(0.01)
    assert np.frombuffer(data, np.int8, offset=4).tolist() == [127, -50, 0, 0]
    assert stages.read(data, 4, Codec.of(["int8"])) == pytest.approx([1.27, -0.5, 0, 0])


def test_signs_are_the_mean_magnitude_and_a_bit_each() -> None:
    values = np.array([3.0, -1.0, 2.0, 0.0, -4.0], np.float32)
    data = stages.written(values, Codec.of(["sign"]))
    assert np.frombuffer(data, "<f4", 1)[0] == 2.0  # (3 + 1 + 2 + 0 + 4) / 5
    assert data[4:] == bytes([0b10110000])
    assert stages.read(data, 5, Codec.of(["sign"])).tolist() == [2, -2, 2, 2, -2]


def test_each_group_has_its_own_scale() -> None:
    values = np.concatenate([np.full(1024, 2.0), np.full(10, -6.0)]).astype(np.float32)
    read = stages.read(stages.written(values, Codec.of(["sign"])), len(values), Codec.of(["sign"]))
    assert np.array_equal(read, values)


def test_the_largest_magnitudes_are_kept_in_their_places() -> None:
    values = np.array([0.1, -5.0, 0.3, 4.0, -0.2], np.float32)
    assert stages.largest(values, 2).tolist() == [1, 3]


def test_positions_are_gaps_of_seven_bits_a_byte() -> None:
    where = np.array([0, 1, 129, 300, 20_000])
    assert positions.pack(where) == bytes([0, 0, 127, 0xAA, 0x01, 0xF3, 0x99, 0x01])  # 0, 0, 127, 170, 19699
    assert positions.unpack(positions.pack(where), 5, 20_001).tolist() == where.tolist()


def test_random_positions_are_those_of_splitmix64_for_ever() -> None:
    first = [int(word) for word in stages.uniform_words(0, 2)]
    assert first == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]  # of the reference implementation with seed 0
    assert stages.key_of(1, 2, 3) == stages.key_of(1, 2, 3) != stages.key_of(1, 2, 4)
    drawn = stages.drawn(1000, 10, 7)
    assert drawn.tolist() == [98, 148, 285, 300, 315, 399, 410, 654, 687, 728]


def test_a_step_with_error_feedback_by_hand() -> None:
    origin = {"w": np.zeros((1, 4), np.float32)}
    where, codec = Layout.of(origin, {"w"}), Codec.of(["topk:0.25"])
    sent, residual = [], None
    for change in ([4.0, 3.0, 1.0, 0.0], [0.0, 3.0, 1.0, 0.0], [0.0, 0.0, 1.0, 0.0]):
        coded = encode({"w": np.array([change], np.float32)}, where, codec, key=0, residual=residual)
        residual = coded.residual
        sent.append(decode(coded.data, where, codec, key=0)["w"][0].tolist())
    assert sent == [[4, 0, 0, 0], [0, 6, 0, 0], [0, 0, 3, 0]]
    assert residual is not None
    assert residual.tolist() == [0, 0, 0, 0]


# --- round trips ---


@pytest.mark.parametrize("chain", CHAINS)
def test_names_shapes_and_types_come_back_and_what_is_not_coded_exactly(chain: tuple[str, ...]) -> None:
    where, new, codec = layout(), model(seed=1), Codec.of(chain)
    back = decode(encode(new, where, codec, key=5).data, where, codec, key=5)
    assert list(back) == list(new)
    for name, value in new.items():
        assert (back[name].shape, back[name].dtype) == (value.shape, value.dtype)
    assert np.array_equal(back["b"], new["b"])
    assert np.array_equal(back["count"], new["count"])


def test_half_of_the_changes_sent_whole_are_exact() -> None:
    where, new, codec = layout(), model(seed=1), Codec.of(["topk:0.5"])
    back = decode(encode(new, where, codec, key=0).data, where, codec, key=0)
    true, found = change_of(new, where), change_of(back, where)
    said = found != 0
    assert said.sum() == codec.count(where.size) == 115
    assert found[said] == pytest.approx(true[said], abs=1e-3)  # fp16's own rounding
    assert np.abs(true[~said]).max() <= np.abs(true[said]).min() + 1e-3


def test_the_estimate_is_what_travels_from_above_and_below_the_most() -> None:
    rng = np.random.default_rng(0)
    origin = {"w": np.zeros((200, 300), np.float32)}
    new = {"w": rng.standard_normal((200, 300)).astype(np.float32)}
    where = Layout.of(origin, {"w"})
    for chain in CHAINS:
        codec = Codec.of(chain)
        size = len(encode(new, where, codec, key=0).data)
        assert 0.6 * estimated_bytes(origin, codec) < size < estimated_bytes(origin, codec) + 100
        assert size < most_bytes(where, codec)


finite = st.floats(-1e6, 1e6, width=32)


@given(
    arrays(np.float32, st.tuples(st.integers(1, 40), st.integers(1, 9)), elements=finite),
    st.sampled_from(CHAINS),
    st.integers(0, 2**64 - 1),
)
def test_anything_finite_comes_back_in_form(
    values: np.ndarray[Any, Any], chain: tuple[str, ...], key: int
) -> None:
    where = Layout.of({"w": np.zeros_like(values)}, {"w"})
    codec = Codec.of(chain)
    back = decode(encode({"w": values}, where, codec, key=key).data, where, codec, key=key)
    assert back["w"].shape == values.shape
    assert np.isfinite(back["w"]).all()


@given(
    st.lists(arrays(np.float32, (6, 5), elements=finite), min_size=1, max_size=6),
    st.sampled_from([c for c in CHAINS if c != ("int8",)]),
)
def test_what_was_sent_and_the_residual_add_up_to_all_changes(
    changes: list[np.ndarray[Any, Any]], chain: tuple[str, ...]
) -> None:
    where, codec = Layout.of({"w": np.zeros((6, 5), np.float32)}, {"w"}), Codec.of(chain)
    residual, total = None, np.zeros(30)
    for number, change in enumerate(changes):
        coded = encode({"w": change}, where, codec, key=number, residual=residual)
        total += decode(coded.data, where, codec, key=number)["w"].ravel()
        residual = coded.residual
    true = np.sum(changes, axis=0, dtype=np.float64).ravel()
    largest = max(np.abs(change).max() for change in changes) * len(changes)
    assert residual is not None
    assert np.abs(total + residual - true).max() <= 1e-5 * largest + 1e-30


@given(st.sets(st.integers(0, 2**31 - 1), max_size=50))
def test_any_positions_come_back(found: set[int]) -> None:
    where = np.array(sorted(found), np.int64)
    assert positions.unpack(positions.pack(where), len(where), 2**31).tolist() == where.tolist()


def test_values_that_are_not_finite_are_not_sent_and_spoil_no_residual() -> None:
    where, codec = layout(), Codec.of(["topk:0.1"])
    new = model(seed=1)
    new["w"][0, 0] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        encode(new, where, codec, key=0)


# --- learning ---


def descend(codec: Codec, steps: int, rate: float = 0.5) -> float:
    """Distance to the minimum of a quadratic whose curvatures span a factor of 20, after steps in a codec."""
    rng = np.random.default_rng(0)
    curvature, target = np.linspace(0.05, 1.0, 50), rng.standard_normal(50)
    where = Layout.of({"w": np.zeros((5, 10), np.float32)}, {"w"})
    x, residual = np.zeros(50), None
    for step in range(steps):
        change = (-rate * curvature * (x - target)).astype(np.float32).reshape(5, 10)
        coded = encode({"w": change}, where, codec, key=step, residual=residual)
        residual = coded.residual
        x = x + decode(coded.data, where, codec, key=step)["w"].ravel()
    return float(np.linalg.norm(x - target))


@pytest.mark.slow
def test_feedback_finds_the_minimum_where_bare_signs_do_not() -> None:
    with_it, without = (descend(Codec.of(["sign"], feedback=f), steps=1500) for f in (True, False))
    assert with_it < 0.01
    assert with_it < without / 3


@pytest.mark.slow
def test_feedback_brings_what_a_small_share_leaves_out() -> None:
    for chain in (["topk:0.02", "sign"], ["topk:0.1", "int8"], ["randomk:0.1"]):
        assert descend(Codec.of(chain), steps=4000, rate=0.05) < 0.05, chain
    # What is kept back comes up to fifty steps late, so steps must be small.
    assert descend(Codec.of(["topk:0.02", "sign"]), steps=300, rate=0.5) > 100


@pytest.mark.slow
def test_random_values_without_feedback_are_right_on_average() -> None:
    where, codec = (
        Layout.of({"w": np.zeros((5, 10), np.float32)}, {"w"}),
        Codec.of(["randomk:0.2"], feedback=False),
    )
    change = np.arange(50, dtype=np.float32).reshape(5, 10)
    sent = [
        decode(encode({"w": change}, where, codec, key=k).data, where, codec, key=k)["w"] for k in range(4000)
    ]
    assert np.mean(sent, axis=0) == pytest.approx(change, abs=5)


# --- what is no update ---


def valid(chain: tuple[str, ...] = ("topk:0.1", "int8")) -> tuple[bytes, Layout, Codec]:
    where, codec = layout(), Codec.of(chain)
    return encode(model(seed=1), where, codec, key=3).data, where, codec


def packed(body: bytes, codec: Codec) -> bytes:
    text = codec.text.encode()
    return b"FU" + bytes([1, len(text)]) + text + zlib.compress(body)


@pytest.mark.slow
@settings(max_examples=5 * settings().max_examples)
@given(st.sampled_from(CHAINS), st.integers(0, 10**9), st.integers(0, 7))
def test_a_flipped_bit_is_refused_or_changes_nothing(chain: tuple[str, ...], at: int, bit: int) -> None:
    data, where, codec = valid(chain)
    changed = bytearray(data)
    changed[at % len(data)] ^= 1 << bit
    try:
        found = decode(bytes(changed), where, codec, key=3)
    except FormatError:
        return
    same = decode(data, where, codec, key=3)
    assert all(np.array_equal(found[name], same[name]) for name in same)


@settings(max_examples=2 * settings().max_examples)
@given(st.sampled_from(CHAINS), st.integers(0, 10**9))
def test_a_truncated_update_is_refused(chain: tuple[str, ...], at: int) -> None:
    data, where, codec = valid(chain)
    with pytest.raises(FormatError, match="codec:"):
        decode(data[: at % len(data)], where, codec, key=3)


@settings(max_examples=3 * settings().max_examples)
@given(st.binary(max_size=400), st.sampled_from(CHAINS))
def test_garbage_is_refused_also_inside_a_valid_stream(body: bytes, chain: tuple[str, ...]) -> None:
    _, where, codec = valid(chain)
    for data in (body, packed(body, codec)):
        try:
            decode(data, where, codec, key=0)
        except FormatError:
            continue
        assert len(body) > where.plain_bytes  # by chance as long as an update


def test_a_stream_that_unpacks_to_more_than_the_model_is_stopped_there(monkeypatch: Any) -> None:
    _, where, codec = valid()
    bomb = packed(bytes(1_000_000), codec)  # a thousand bytes; it could be gigabytes
    assert len(bomb) < most_bytes(where, codec)
    with pytest.raises(FormatError, match="holds more than"):
        decode(bomb, where, codec, key=0)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: b"XX" + d[2:], "not an update in a codec"),
        (lambda d: d[:2] + b"\x02" + d[3:], "version 2; this server reads 1"),
        (lambda d: d.replace(b"topk:0.1+int8", b"topk:0.2+int8"), "in 'topk:0.2.int8', asked for was"),
        (lambda d: d + b"tail", "has a tail"),
        (lambda d: d + bytes(10_000), "over the"),
        (lambda d: b"", "not an update"),
    ],
)
def test_each_fault_of_the_outside_is_named(change: Any, says: str) -> None:
    data, where, codec = valid()
    with pytest.raises(FormatError, match=says):
        decode(change(data), where, codec, key=3)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"\0" * 10, "travel as they are"),
        (b"\0" * 44, "ends before its positions"),
        (b"\0" * 44 + b"\xff\xff\xff\x7f", "are declared"),
        (b"\0" * 44 + b"\x17\0\0\0" + bytes(23), "do not hold 23 values"),
        (b"\0" * 44 + b"\x16\0\0\0" + bytes(22), "22 positions instead of 23"),
        (b"\0" * 44 + b"\x18\0\0\0" + bytes(23) + b"\x80", "23 positions instead of 23|instead of 23"),
        (b"\0" * 44 + b"\x19\0\0\0" + bytes(22) + b"\xff\x01\x00", "positions instead"),
        (b"\0" * 44 + b"\x18\0\0\0" + bytes(22) + b"\xff\x7f" + bytes(27), "is not below 230"),
        (b"\0" * 44 + b"\x1c\0\0\0" + bytes(22) + b"\xff\xff\xff\xff\xff\x01" + bytes(27), "over 5"),
        (b"\0" * 44 + b"\x17\0\0\0" + bytes(23) + b"\0\0\xc0\x7f" + bytes(23), "not finite"),
        (b"\0" * 44 + b"\x17\0\0\0" + bytes(23) + b"\0\0\x80\xbf" + bytes(23), "below 0"),
    ],
)
def test_each_fault_of_the_inside_is_named(body: bytes, says: str) -> None:
    _, where, codec = valid()
    assert (where.plain_bytes, codec.count(where.size)) == (44, 23)
    with pytest.raises(FormatError, match=says):
        decode(packed(body, codec), where, codec, key=0)
