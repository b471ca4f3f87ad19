"""What a client keeps back is decided by the example itself."""

from __future__ import annotations

import hashlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fedge.holdout import kept_back, places


def test_a_place_is_the_keyed_hash_of_the_examples_bytes():
    x = np.arange(6, dtype=np.uint8).reshape(2, 3)
    digest = hashlib.blake2b(bytes([3, 4, 5]), key=(7).to_bytes(8, "little"), digest_size=8).digest()
    assert places(x, 7)[1] == (int.from_bytes(digest, "little") >> 11) / 2**53


def test_order_and_company_do_not_matter():
    x = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    order = np.random.default_rng(1).permutation(50)[:20]
    assert (places(x[order], 3) == places(x, 3)[order]).all()


def test_another_seed_keeps_others_back():
    x = np.arange(1000, dtype=np.float32)[:, None]
    assert (kept_back(places(x, 0), 0.2) != kept_back(places(x, 1), 0.2)).any()


def test_about_the_share_is_kept_back():
    x = np.arange(10_000, dtype=np.float32)[:, None]
    assert abs(kept_back(places(x, 0), 0.2).mean() - 0.2) < 0.012  # three deviations


@given(st.lists(st.floats(0, 1, exclude_max=True), max_size=12), st.floats(0, 0.99))
def test_one_example_trains_however_few_there_are(of, share):
    held = kept_back(np.array(of, dtype=np.float64), share)
    assert len(held) == len(of)
    assert not len(of) or not held.all()
