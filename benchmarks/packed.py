"""A fuzz run of the packed layout's decoder: damaged, forged and oversized wires, and what they cost.

Every wire is derived from that of a small model by one kind of damage, of a seed: bits flipped, bytes
overwritten, cut off, put in, two wires joined, lengths in the header replaced by extreme ones, a skeleton
forged so that it still inflates, and another length declared than was packed. A wire may be refused with
FormatError or give the installed file unchanged; whatever else happens is a fault. Beside that: the longest
call, and the largest memory at a time, in declared lengths (or 200 kB, where that is more: what numpy and
zlib take for themselves).
"""

from __future__ import annotations

import time
import tracemalloc
from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx
from _harness import Options, Row, machine, options, publish
from onnx import numpy_helper

from fedge import packed
from fedge.errors import FormatError

CASES, QUICK_CASES = 60_000, 5_000
OWN_BYTES = 200_000  # what the libraries need whatever the file
WATCHED = 20  # memory of every so many-th call is followed, which makes it slow

Damage = Callable[[bytes, np.random.Generator], bytes]


def models(rng: np.random.Generator) -> list[bytes]:
    """Installed files with weights on grids of several widths, in planes, and of no kind."""

    def graph(*arrays: np.ndarray) -> bytes:
        made = onnx.GraphProto(name="g")
        made.initializer.extend(numpy_helper.from_array(array, f"t{i}") for i, array in enumerate(arrays))
        return onnx.ModelProto(ir_version=10, graph=made).SerializeToString(deterministic=True)

    def on_grid(shape: tuple[int, ...], levels: int) -> np.ndarray:
        scales = rng.uniform(0.001, 0.3, (shape[0], *[1] * (len(shape) - 1))).astype(np.float16)
        codes = rng.integers(-levels, levels + 1, shape)
        return (codes * scales.astype(np.float32)).astype(np.float32) + np.float32(0)

    plain = rng.normal(size=(16, 17)).astype(np.float32)
    return [
        graph(on_grid((6, 20), 7), on_grid((9, 5), 1)),
        graph(on_grid((5, 2, 3, 3), 1), np.arange(40, dtype=np.float32)),
        graph(plain, on_grid((4, 9), 127)),
        b"nothing that is a graph " * 30,
    ]


def flipped(wire: bytes, rng: np.random.Generator) -> bytes:
    """One to eight bits are others."""
    found = bytearray(wire)
    for _ in range(rng.integers(1, 9)):
        found[rng.integers(0, len(found))] ^= 1 << rng.integers(0, 8)
    return bytes(found)


def overwritten(wire: bytes, rng: np.random.Generator) -> bytes:
    """One to sixteen bytes in a row are others, often the extreme ones."""
    found, n = bytearray(wire), int(rng.integers(1, 17))
    at = int(rng.integers(0, max(len(found) - n, 1)))
    found[at : at + n] = bytes([rng.choice([0, 255, 128, 127])]) * n if rng.random() < 0.5 else rng.bytes(n)
    return bytes(found)


def cut(wire: bytes, rng: np.random.Generator) -> bytes:
    """It ends early, or a piece is missing."""
    at = int(rng.integers(0, len(wire)))
    return wire[:at] if rng.random() < 0.5 else wire[:at] + wire[at + int(rng.integers(1, 30)) :]


def longer(wire: bytes, rng: np.random.Generator) -> bytes:
    """Bytes are put in, or follow."""
    at = len(wire) if rng.random() < 0.5 else int(rng.integers(0, len(wire)))
    return wire[:at] + rng.bytes(int(rng.integers(1, 400))) + wire[at:]


def joined(wire: bytes, rng: np.random.Generator) -> bytes:
    """It goes on as it went on somewhere else."""
    return wire[: rng.integers(0, len(wire))] + wire[rng.integers(0, len(wire)) :]


def lengthened(wire: bytes, rng: np.random.Generator) -> bytes:
    """The header's length of the skeleton is another."""
    length = int(rng.choice([0, 1, len(wire), 2**16, 2**31 - 1, 2**32 - 1, rng.integers(0, 2**32)]))
    return wire[:8] + length.to_bytes(4, "little") + wire[12:]


def forged(wire: bytes, rng: np.random.Generator) -> bytes:
    """The table says something else, in a skeleton that still inflates: what an attacker would send."""
    length = int.from_bytes(wire[8:12], "little")
    skeleton = bytearray(packed._inflated(wire[12 : 12 + length], 2**20))
    for _ in range(rng.integers(1, 6)):
        at = int(rng.integers(0, min(len(skeleton), 60)))
        if rng.random() < 0.3:
            skeleton[at:at] = b"\xff\xff\xff\xff\x0f"[: rng.integers(1, 6)]  # numbers as large as they go
        else:
            skeleton[at] = rng.integers(0, 256)
    short = packed._deflated(bytes(skeleton))
    return wire[:8] + len(short).to_bytes(4, "little") + short + wire[12 + length :]


DAMAGES: tuple[Damage, ...] = (flipped, overwritten, cut, longer, joined, lengthened, forged)


def fuzzed(cases: int) -> tuple[list[Row], dict[str, float]]:
    """A line for each kind of damage, and the claims."""
    rng = np.random.default_rng(0)
    wires = [(packed.pack(installed), installed) for installed in models(rng)]
    seen: dict[str, Counter[str]] = {damage.__name__: Counter() for damage in (*DAMAGES, declared)}
    peak, slowest = 0.0, 0.0
    for case in range(cases):
        wire, installed = wires[case % len(wires)]
        damage = (*DAMAGES, declared)[int(rng.integers(0, len(seen)))]
        length = len(installed)
        if damage is declared:
            bad, length = wire, declared(length, rng)
        else:
            bad = damage(wire, rng)
        watch = case % WATCHED == 0
        if watch:
            tracemalloc.start()
        began = time.process_time()
        seen[damage.__name__][outcome(bad, length, installed)] += 1
        if watch:
            peak = max(peak, tracemalloc.get_traced_memory()[1] / max(length, OWN_BYTES / 4))
            tracemalloc.stop()
        else:
            slowest = max(slowest, time.process_time() - began)
    rows = [
        {
            "damage": name,
            "wires": sum(counts.values()),
            "refused": counts["refused"],
            "unchanged": counts["unchanged"],
            "wrong": counts["wrong"],
        }
        for name, counts in seen.items()
    ]
    return rows, {
        "fuzz_wires": cases,
        "fuzz_wrong": sum(counts["wrong"] for counts in seen.values()),
        "fuzz_peak_in_declared_lengths": peak,
        "fuzz_slowest_ms": 1000 * slowest,
    }


def declared(length: int, rng: np.random.Generator) -> int:
    """A length that is not the file's."""
    return int(rng.choice([0, 1, length - 1, length + 1, 2 * length, 10**6, rng.integers(0, 10**6)]))


def outcome(wire: bytes, length: int, installed: bytes) -> str:
    """What becomes of a wire."""
    try:
        return "unchanged" if packed.unpack(wire, length) == installed else "wrong"
    except FormatError:
        return "refused"


def main(asked: Options) -> None:
    """Measure, print, write."""
    before = machine()
    rows, claims = fuzzed(QUICK_CASES if asked.quick else CASES)
    publish(asked, before, claims, rows)


if __name__ == "__main__":
    main(options(__doc__ or ""))
