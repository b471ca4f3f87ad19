"""What sealing costs: seal and open 5 MiB beside the bare ciphers, wrap keys, memory, and a fuzz run.

The bare ciphers take the whole file in one call, under one tag: they can give nothing out before the end,
and need the file twice in memory. Sealing and opening go by chunks of 64 KiB. The fuzz run damages sealed
files in one of six ways each; every one must be refused.
"""

from __future__ import annotations

import os
import statistics
import time
import tracemalloc
from collections.abc import Callable, Iterator

import numpy as np
from _harness import Row, machine, options, publish
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from fedge.errors import TrustError
from fedge.sealing import Place, key_id, new_key, opened, seal, sealing, unseal, unwrap, wrap

FILE_BYTES = 5 * 2**20
STREAM_BYTES, PIECE_BYTES = 64 * 2**20, 64 * 1024
TURNS, QUICK_TURNS = 15, 5
WRAPS, QUICK_WRAPS = 2_000, 300
FUZZED, QUICK_FUZZED = 20_000, 1_000
PLACE, DEVICE = Place("micro", 7), "ab" * 32


def in_turns(work: dict[str, Callable[[], object]], turns: int) -> dict[str, float]:
    """Median seconds of each, all of them in each turn."""
    taken: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(turns):
        for name, run in work.items():
            start = time.perf_counter()
            run()
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


def speed(turns: int) -> tuple[list[Row], dict[str, float]]:
    """A file of 5 MiB, sealed and opened."""
    data, key, nonce = os.urandom(FILE_BYTES), new_key(), bytes(12)
    sealed = seal(data, key, PLACE)
    ciphers = {"ChaCha20-Poly1305, bare": ChaCha20Poly1305(key), "AES-256-GCM, bare": AESGCM(key)}
    closed = {name: cipher.encrypt(nonce, data, None) for name, cipher in ciphers.items()}
    to: dict[str, Callable[[], object]] = {"sealed": lambda: seal(data, key, PLACE)}
    back: dict[str, Callable[[], object]] = {"sealed": lambda: unseal(sealed, key, PLACE)}
    for name, cipher in ciphers.items():
        to[name] = lambda cipher=cipher: cipher.encrypt(nonce, data, None)  # type: ignore[misc]
        back[name] = lambda cipher=cipher, name=name: cipher.decrypt(nonce, closed[name], None)  # type: ignore[misc]
    seals, opens = in_turns(to, turns), in_turns(back, turns)
    added = {"sealed": len(sealed) - len(data), **{name: len(closed[name]) - len(data) for name in closed}}
    rows: list[Row] = [
        {
            "5 MiB": name,
            "seal: ms": seals[name] * 1e3,
            "open: ms": opens[name] * 1e3,
            "MB/s opened": FILE_BYTES / 1e6 / opens[name],
            "bytes added": added[name],
        }
        for name in seals
    ]
    claims = {
        "seal_mb_per_s": FILE_BYTES / 1e6 / seals["sealed"],
        "open_mb_per_s": FILE_BYTES / 1e6 / opens["sealed"],
        "bytes_added_5_mib": float(added["sealed"]),
    }
    return rows, claims


def wraps(count: int) -> tuple[list[Row], dict[str, float]]:
    """Content keys wrapped, and unwrapped."""
    key, private = new_key(), X25519PrivateKey.generate()
    public, name = private.public_key().public_bytes_raw(), key_id(key)
    place = {"tier": "micro", "version": 7, "device_id": DEVICE}
    wrapped = wrap(key, public, **place)  # type: ignore[arg-type]

    def each(run: Callable[[], object]) -> float:
        start = time.perf_counter()
        for _ in range(count):
            run()
        return count / (time.perf_counter() - start)

    there = each(lambda: wrap(key, public, **place))  # type: ignore[arg-type]
    back = each(lambda: unwrap(wrapped, private, expected=name, **place))  # type: ignore[arg-type]
    return (
        [{"content key": "for one device", "wraps/s": there, "unwraps/s": back, "bytes": len(wrapped)}],
        {"wraps_per_s": there, "unwraps_per_s": back},
    )


def memory() -> tuple[list[Row], dict[str, float]]:
    """The most that is held at a time while 64 MiB are sealed and opened in pieces."""
    piece, key = os.urandom(PIECE_BYTES), new_key()

    def pieces() -> Iterator[bytes]:
        return (piece for _ in range(STREAM_BYTES // PIECE_BYTES))

    tracemalloc.start()
    total = sum(map(len, opened(sealing(pieces(), key, PLACE), key, PLACE)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    if total != STREAM_BYTES:
        raise AssertionError("what was opened is not what was sealed")
    row: Row = {"in pieces of 64 KiB": "sealed and opened", "MiB": total / 2**20, "peak kB": peak / 1e3}
    return [row], {"stream_peak_kb": peak / 1e3}


def fuzz(count: int) -> tuple[list[Row], dict[str, float]]:
    """Damaged files, each of which must be refused."""
    rng, key = np.random.default_rng(0), new_key()
    whole = seal(os.urandom(150_000), key, PLACE)
    other = seal(os.urandom(150_000), key, PLACE)
    slot, head = 65_536 + 16, 56

    def damaged(kind: int) -> bytes:
        at = int(rng.integers(0, len(whole)))
        if kind == 0:
            return whole[:at] + bytes([whole[at] ^ int(rng.integers(1, 256))]) + whole[at + 1 :]
        if kind == 1:
            return whole[:at]
        if kind == 2:
            return whole + rng.bytes(int(rng.integers(1, 70_000)))
        if kind == 3:
            return (
                whole[:head] + whole[head + slot : head + 2 * slot] + whole[head : head + slot] + whole[-100:]
            )
        if kind == 4:
            return whole[:at] + other[at:]
        return whole[:at] + whole[int(rng.integers(0, len(whole))) :]

    opened_wrongly = refused = 0
    for number in range(count):
        made = damaged(number % 6)
        if made == whole:
            continue
        try:
            unseal(made, key, PLACE)
            opened_wrongly += 1
        except TrustError:
            refused += 1
    row: Row = {"damaged files": refused + opened_wrongly, "refused": refused, "opened": opened_wrongly}
    return [row], {"fuzz_files": float(refused), "fuzz_wrong": float(opened_wrongly)}


def main() -> None:
    """Measure and publish."""
    asked = options(__doc__ or "")
    before = machine()
    parts = (
        speed(QUICK_TURNS if asked.quick else TURNS),
        wraps(QUICK_WRAPS if asked.quick else WRAPS),
        memory(),
        fuzz(QUICK_FUZZED if asked.quick else FUZZED),
    )
    claims = {name: value for _, found in parts for name, value in found.items()}
    publish(asked, before, claims, [row for rows, _ in parts for row in rows])


if __name__ == "__main__":
    main()
