"""Which place in a bounded memory a new example takes, if any, so that all that came have the same chance.

- `uniform`: J. S. Vitter, "Random sampling with a reservoir" (ACM TOMS 11, 1985), algorithm R: of n examples
  each is kept with probability size / n.
- `balanced`: A. Chrysakis, M.-F. Moens, "Online continual learning from imbalanced data" (ICML 2020):
  the same within each class, and classes get equal room as far as they have examples.

Both are pure: they take counts and a source of randomness, and know nothing of what is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

Below = Callable[[int], int]
"""A random whole number from 0 to below the argument."""


def uniform(seen: int, size: int, below: Below) -> int | None:
    """The place of a new example; None: it is not kept.

    Args:
        seen: examples before it.
        size: of the memory.
        below: randomness.
    """
    if seen < size:
        return seen
    place = below(seen + 1)
    return place if place < size else None


def balanced(
    label: int, places: Sequence[int], seen: Mapping[int, int], full: set[int], size: int, below: Below
) -> int | None:
    """The place of a new example; None: it is not kept.

    Args:
        label: its class.
        places: class of the example at each place that is taken.
        seen: by class, examples before it.
        full: classes that have been the largest, once nothing was free; those of now are added to it.
        size: of the memory.
        below: randomness.
    """
    if len(places) < size:
        return len(places)
    counts: dict[int, int] = {}
    for own in places:
        counts[own] = counts.get(own, 0) + 1
    most = max(counts.values())
    largest = {own for own, count in counts.items() if count == most}
    full |= largest
    if label not in full:
        return _one_of([place for place, own in enumerate(places) if own in largest], below)
    own_places = [place for place, own in enumerate(places) if own == label]
    if below(seen.get(label, 0) + 1) >= len(own_places):
        return None
    return _one_of(own_places, below)


def _one_of(places: Sequence[int], below: Below) -> int:
    return places[below(len(places))]
