"""Who shares masks with whom: a random regular graph of few neighbours (Bell et al. 2020, SecAgg+)."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

LEAST: Final = 3  # clients in a sum: of two, each knows the other's
SECURITY_BITS: Final = 40  # privacy fails with a probability of at most 2^-40 for a graph drawn at random
CORRECT_BITS: Final = 20  # so many drop-outs cost a round with a probability of at most 2^-20


@dataclass(frozen=True, slots=True)
class Degree:
    """How dense a graph is."""

    neighbours: int  # of each client
    threshold: int  # of a client and its neighbours whose shares open one of its secrets: more than half


def degree_of(clients: int, *, corrupt: float, dropouts: float, neighbours: int = 0) -> Degree:
    """The fewest neighbours that are safe for so many clients, and the threshold that goes with them.

    The conditions of Bell et al. (theorem 3.10), with exact hypergeometric tails: no client has as many
    corrupt neighbours as the threshold, and the graph of honest clients that stay holds together (each but
    for 2^-40); each keeps as many neighbours as the threshold (but for 2^-20). Where no sparse graph does,
    all are neighbours. The threshold is above half of a neighbourhood, and as far above as its expected
    corrupt members need, so that a server that tells neighbours different things does not get both secrets
    of a client.

    Args:
        clients: that begin a round, from 3.
        corrupt: share of them that may work together with the server.
        dropouts: share of them that may be lost in a round.
        neighbours: a wish; 0: none. Rounded up to an even number.

    Raises:
        ValueError: clients below 3.
    """
    if clients < LEAST:
        raise ValueError(f"{clients} clients: a sum of fewer than {LEAST} hides nobody")
    complete = clients - 1
    if neighbours:
        chosen = min(neighbours + neighbours % 2, complete)
        return Degree(chosen, _threshold(chosen, corrupt))
    bad, gone = math.floor(corrupt * clients), math.floor(dropouts * clients)
    for count in range(4, complete, 2):
        threshold = _threshold(count, corrupt)
        if (
            clients * _tail(clients - 1, bad, count, threshold) <= 2.0**-SECURITY_BITS
            and clients * (corrupt + dropouts) ** count <= 2.0**-SECURITY_BITS
            and clients * _tail(clients - 1, gone, count, count - threshold + 1) <= 2.0**-CORRECT_BITS
        ):
            return Degree(count, threshold)
    return Degree(complete, _threshold(complete, corrupt))


def neighbours_of(clients: Sequence[int], count: int, draw: random.Random) -> dict[int, list[int]]:
    """A random graph in which each client has so many neighbours, in ascending order.

    A ring in random order, each joined to those nearest to it on both sides (a Harary graph).

    Args:
        clients: each once.
        count: even, or that of all others.
        draw: decides the order.
    """
    ring, size = sorted(clients), len(clients)
    if count >= size - 1:
        return {client: [other for other in ring if other != client] for client in ring}
    draw.shuffle(ring)
    reach = [step for near in range(1, count // 2 + 1) for step in (near, -near)]
    return {
        client: sorted(ring[(place + step) % size] for step in reach) for place, client in enumerate(ring)
    }


def _threshold(neighbours: int, corrupt: float) -> int:
    """The least t with 2 t > h + c, for h holders of shares (a client and its neighbours), c of them corrupt.

    Honest holders give one kind of share and corrupt ones both: h + c shares of both kinds together.
    """
    holders = neighbours + 1
    return min(math.floor(holders * (1 + corrupt) / 2) + 1, holders)


def _tail(others: int, marked: int, drawn: int, least: int) -> float:
    """The probability that of `drawn` out of `others`, without replacement, `least` or more are marked."""
    low, high = max(least, drawn - (others - marked), 0), min(drawn, marked)
    ways = sum(math.comb(marked, k) * math.comb(others - marked, drawn - k) for k in range(low, high + 1))
    return ways / math.comb(others, drawn)
