"""Reservoirs: every example has the same chance, and classes equal room."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest

from fedge_client.memory.reservoir import balanced, uniform


def test_every_example_is_kept_with_the_same_probability() -> None:
    draw, size, n, times = random.Random(0), 5, 40, 4000
    kept: Counter[int] = Counter()
    for _ in range(times):
        memory: list[int] = []
        for item in range(n):
            place = uniform(item, size, draw.randrange)
            if place == len(memory):
                memory.append(item)
            elif place is not None:
                memory[place] = item
        kept.update(memory)
    p = size / n
    deviation = math.sqrt(times * p * (1 - p))
    assert all(abs(kept[item] - times * p) < 4.5 * deviation for item in range(n))


def stream(labels: list[int], size: int, seed: int) -> list[tuple[int, int]]:
    """What is kept: (label, number within its class)."""
    draw, memory, seen, full = random.Random(seed), [], Counter[int](), set[int]()
    for label in labels:
        place = balanced(label, [own for own, _ in memory], seen, full, size, draw.randrange)
        item = (label, seen[label])
        seen[label] += 1
        if place == len(memory):
            memory.append(item)
        elif place is not None:
            memory[place] = item
    return memory


def test_a_rare_class_gets_as_much_room_as_it_can_fill() -> None:
    draw = random.Random(1)
    labels = draw.choices([0, 1, 2], [0.9, 0.08, 0.02], k=2000)
    counts = Counter(label for label, _ in stream(labels, 60, 2))
    assert max(counts.values()) - min(counts.values()) <= 2


@pytest.mark.slow
def test_within_a_class_every_example_has_the_same_probability() -> None:
    times, kept = 3000, Counter[tuple[int, int]]()
    labels = [0] * 30 + [1] * 4 + [0] * 30
    for seed in range(times):
        kept.update(stream(labels, 8, seed))
    assert all(kept[(1, number)] == times for number in range(4))  # the rare class is kept whole
    share = sum(kept[(0, number)] for number in range(60)) / times / 60
    deviation = math.sqrt(times * share * (1 - share))
    assert all(abs(kept[(0, number)] - times * share) < 4.5 * deviation for number in range(60))
