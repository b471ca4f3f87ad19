"""The arithmetic of secure aggregation: shares, masks, boxes, graph and encoding."""

import math
import os
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge.errors import FormatError
from fedge.secagg import masks, shamir
from fedge.secagg.encoding import EXTRAS, Encoding, flat, unflat
from fedge.secagg.masks import Session
from fedge_server.secagg.graph import degree_of, neighbours_of

HERE = Session("run-1", 3, bytes(16))
A, B = bytes([1] * 32), bytes([2] * 32)


@given(st.integers(1, 12), st.integers(0, 8), st.randoms(use_true_random=False))
def test_any_threshold_of_shares_gives_the_secret(threshold: int, more: int, draw: random.Random) -> None:
    secret = shamir.below_prime(draw.randbytes)
    shares = dict(enumerate(shamir.share(secret, threshold, threshold + more, draw.randbytes), 1))
    chosen = draw.sample(sorted(shares), threshold)
    assert shamir.combine({place: shares[place] for place in chosen}, threshold) == secret
    if threshold > 1:
        with pytest.raises(ValueError, match="are needed"):
            shamir.combine({place: shares[place] for place in chosen[1:]}, threshold)


def test_one_share_too_few_fits_every_secret() -> None:
    shares = dict(enumerate(shamir.share(A, 4, 6, os.urandom), 1))
    few = {place: shares[place] for place in (2, 3, 5)}
    for secret in (bytes(32), B, shamir.below_prime(os.urandom)):
        # A fourth share that leads to this secret: sum of weight * share = secret, solved for it.
        points = [*few, 6]
        weight = {
            i: math.prod(o * pow(o - i, -1, shamir.PRIME) for o in points if o != i) % shamir.PRIME
            for i in points
        }
        known = sum(weight[i] * int.from_bytes(few[i]) for i in few)
        last = (int.from_bytes(secret) - known) * pow(weight[6], -1, shamir.PRIME) % shamir.PRIME
        assert shamir.combine({**few, 6: last.to_bytes(32)}, 4) == secret


@pytest.mark.parametrize(
    ("secret", "threshold", "count"),
    [(b"short", 1, 1), (b"\xff" * 32, 1, 1), (A, 0, 1), (A, 3, 2), (A, 1, 10**6)],
)
def test_secrets_and_counts_out_of_range_are_refused(secret: bytes, threshold: int, count: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        shamir.share(secret, threshold, count, os.urandom)


@pytest.mark.parametrize("share", [b"short", b"\xff" * 32])
def test_what_is_no_share_is_refused(share: bytes) -> None:
    with pytest.raises(ValueError, match="share 2"):
        shamir.combine({1: A, 2: share}, 2)


def test_the_masks_of_two_clients_cancel() -> None:
    total = np.arange(100_000, dtype=np.uint32)
    key, same = (masks.pairwise_key(a, masks.public_key(b), HERE) for a, b in ((A, B), (B, A)))
    assert key == same
    masks.add_mask(total, key)
    assert len(np.unique(total)) > 99_000
    masks.add_mask(total, key, negative=True)
    assert np.array_equal(total, np.arange(100_000))


@pytest.mark.parametrize(
    "other", [Session("run-2", 3, bytes(16)), Session("run-1", 4, bytes(16)), Session("run-1", 3, b"1" * 16)]
)
def test_keys_and_boxes_serve_one_session(other: Session) -> None:
    assert masks.pairwise_key(A, masks.public_key(B), HERE) != masks.pairwise_key(
        A, masks.public_key(B), other
    )
    assert masks.self_key(A, HERE) != masks.self_key(A, other)
    box = masks.seal(A, masks.public_key(B), HERE, 1, 2, b"shares")
    assert masks.unseal(B, masks.public_key(A), HERE, 1, 2, box) == b"shares"
    with pytest.raises(FormatError, match="client 1"):
        masks.unseal(B, masks.public_key(A), other, 1, 2, box)


def test_boxes_that_were_changed_swapped_or_turned_round_are_refused() -> None:
    box = masks.seal(A, masks.public_key(B), HERE, 1, 2, b"shares")
    turned = masks.seal(B, masks.public_key(A), HERE, 2, 1, b"shares")
    for sender, receiver, content in (
        (1, 2, box[:-1] + b"?"),
        (1, 2, turned),
        (3, 2, box),
        (1, 3, box),
        (1, 2, b""),
    ):
        with pytest.raises(FormatError, match=f"client {sender}"):
            masks.unseal(B, masks.public_key(A), HERE, sender, receiver, content)


@pytest.mark.parametrize("key", [bytes(32), b"\x01" + bytes(31), b"short"])
def test_keys_that_agree_on_nothing_are_refused(key: bytes) -> None:
    with pytest.raises(FormatError, match="public key"):
        masks.pairwise_key(A, key, HERE)


@pytest.mark.slow
@given(st.integers(3, 400), st.floats(0, 0.3), st.floats(0, 0.45))
def test_graphs_are_regular_and_their_threshold_is_above_half(
    clients: int, corrupt: float, lost: float
) -> None:
    degree = degree_of(clients, corrupt=corrupt, dropouts=lost)
    graph = neighbours_of(range(clients), degree.neighbours, random.Random(1))
    assert {len(others) for others in graph.values()} == {degree.neighbours}
    assert all(one in graph[other] and one != other for one, others in graph.items() for other in others)
    assert degree.neighbours + 1 < 2 * degree.threshold <= 2 * (degree.neighbours + 1)


def test_large_rounds_have_few_neighbours_each() -> None:
    dense = [degree_of(clients, corrupt=0.1, dropouts=0.2).neighbours for clients in (10, 100, 1000, 10_000)]
    assert dense == [9, 44, 102, 128]  # logarithmic, as the paper has it


@pytest.mark.slow
@given(st.integers(3, 1000), st.data())
def test_the_mean_of_encoded_changes_is_within_the_stated_error(clients: int, data: st.DataObject) -> None:
    draw = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    encoding = Encoding(largest=0.5, most_examples=1000, clients=clients)
    examples = draw.integers(1, 1001, clients)
    changes = draw.uniform(-0.5, 0.5, (clients, 7))
    if data.draw(st.booleans()):
        changes[:] = 0.5  # the largest that a sum can become
        examples[:] = 1000
    losses = draw.uniform(0, 3, clients)
    total = np.zeros(7 + EXTRAS, np.uint32)
    for change, count, loss in zip(changes, examples, losses, strict=True):
        total += encoding.encode(change.copy(), int(count), float(loss))
    found = encoding.decode(total)
    assert (found.clients, found.examples, found.cut) == (clients, examples.sum(), 0)
    mean = np.average(changes, axis=0, weights=examples)
    assert np.abs(found.mean - mean).max() <= encoding.error(clients, int(examples.sum())) * (1 + 1e-9)
    assert found.loss == pytest.approx(np.average(losses, weights=examples), rel=1e-2, abs=1e-2)


def test_values_beyond_the_range_are_cut_and_counted() -> None:
    encoding = Encoding(largest=0.5, most_examples=10, clients=3)
    found = encoding.decode(encoding.encode(np.array([7.0, -7.0, 0.1]), 20, 1e9))
    assert found.mean == pytest.approx([0.5, -0.5, 0.1], abs=1e-6)
    assert (found.examples, found.cut, found.loss) == (10, 1, pytest.approx(16, rel=1e-6))


@pytest.mark.parametrize("change", [math.nan, math.inf])
def test_changes_that_are_not_finite_never_enter_a_sum(change: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        Encoding(1.0, 10, 3).encode(np.array([change]), 1, 0.0)


@pytest.mark.parametrize(
    ("largest", "most", "clients"), [(1.0, 2**30, 2), (0.0, 1, 3), (math.inf, 1, 3), (1.0, 1, 2**24)]
)
def test_an_encoding_that_could_overflow_cannot_be_made(largest: float, most: int, clients: int) -> None:
    with pytest.raises(ValueError, match=r"must|needed"):
        Encoding(largest, most, clients)


def test_changes_of_arrays_come_back_in_their_shapes() -> None:
    origin = {"w": np.ones((2, 3), np.float32), "n": np.array(4, np.int64)}
    arrays = {"w": np.full((2, 3), 1.5, np.float32), "n": np.array(9, np.int64)}
    found = unflat(flat(arrays, origin), origin)
    assert all(
        np.array_equal(found[name], arrays[name]) and found[name].dtype == arrays[name].dtype
        for name in origin
    )
