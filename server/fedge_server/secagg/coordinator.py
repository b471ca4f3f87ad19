"""The server's part in secure aggregation: it forwards, adds up, and opens what a threshold allows."""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np

from fedge.errors import FedgeError, RoundError
from fedge.secagg import masks, shamir
from fedge.secagg.masks import Session, Words
from fedge.secagg.protocol import Box, Dealt, Keys, Revealed, check_signature, places
from fedge_server.secagg.graph import LEAST, Degree, degree_of, neighbours_of


@dataclass(slots=True)
class Coordinator:
    """One session. Answers are handed to it as they arrive; a wrong one costs its client and nobody else.

    Every method that takes an answer returns the reason why it was refused, or None.
    """

    session: Session
    asked: frozenset[int]
    length: int  # values that each client sends
    least: int  # clients in a sum that is opened, from 3
    draw: random.Random  # decides the graph
    corrupt: float = 0.1
    dropouts: float = 0.2
    neighbours: int = 0
    signed: bool = False  # clients have identities
    degree: Degree | None = None
    total: Words = field(init=False)
    _keys: dict[int, Keys] = field(default_factory=dict)
    _graph: dict[int, list[int]] = field(default_factory=dict)
    _dealt: dict[int, Dealt] = field(default_factory=dict)
    _confirmed: dict[int, frozenset[int]] = field(default_factory=dict)
    _partners: dict[int, frozenset[int]] = field(default_factory=dict)
    _present: set[int] = field(default_factory=set)
    _revealed: set[int] = field(default_factory=set)
    # Shares of what must be opened, by the holder's place: seeds of those present, keys of those lost.
    _seeds: dict[int, dict[int, bytes]] = field(default_factory=dict)
    _lost: dict[int, dict[int, bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.least < LEAST:
            raise ValueError(f"least = {self.least}: a sum of fewer than {LEAST} hides nobody")
        self.total = np.zeros(self.length, np.uint32)

    def take_keys(self, client: int, keys: Keys) -> str | None:
        """A client's public keys."""
        if client not in self.asked or client in self._keys or self._graph:
            return "keys: not asked for, given twice, or too late"
        used = {key for other in self._keys.values() for key in (other.channel, other.mask)}
        if {keys.channel, keys.mask} & used or keys.channel == keys.mask:
            return "keys: another client has the same"
        try:
            masks.pairwise_key(bytes(range(32)), keys.mask, self.session)  # refuses points of small order
            masks.pairwise_key(bytes(range(32)), keys.channel, self.session)
            if self.signed:
                check_signature(self.session, client, keys)
        except FedgeError as error:
            return str(error)
        self._keys[client] = keys
        return None

    def for_shares(self) -> tuple[dict[int, dict[int, Keys]], int]:
        """For each client its neighbours' keys, and the threshold.

        Raises:
            RoundError: too few clients have given keys.
        """
        self._enough(self._keys, "gave keys")
        if not self._graph:
            self.degree = degree_of(
                len(self._keys), corrupt=self.corrupt, dropouts=self.dropouts, neighbours=self.neighbours
            )
            self._graph = neighbours_of(list(self._keys), self.degree.neighbours, self.draw)
        near = {
            client: {other: self._keys[other] for other in others} for client, others in self._graph.items()
        }
        return near, self._threshold

    def take_shares(self, client: int, dealt: Dealt) -> str | None:
        """A client's boxes."""
        if client not in self._graph or client in self._dealt or self._confirmed:
            return "shares: not asked for, given twice, or too late"
        if sorted(dealt.boxes) != self._graph[client]:
            return "shares: not one box for each neighbour"
        self._dealt[client] = dealt
        return None

    def for_check(self) -> dict[int, dict[int, Box]]:
        """For each client that has dealt, the boxes for it.

        Raises:
            RoundError: too few clients are left.
        """
        self._enough(self._dealt, "gave shares")
        return {
            client: {
                other: self._dealt[other].boxes[client]
                for other in self._graph[client]
                if other in self._dealt
            }
            for client in self._dealt
        }

    def take_check(self, client: int, good: Collection[int]) -> str | None:
        """Whose boxes a client has found in order."""
        if client not in self._dealt or client in self._confirmed or self._partners:
            return "check: not asked for, given twice, or too late"
        if not set(good) <= set(self._graph[client]) & self._dealt.keys():
            return "check: names clients whose boxes it was not sent"
        self._confirmed[client] = frozenset(good)
        return None

    def for_masking(self) -> dict[int, frozenset[int]]:
        """For each client that goes on, those it shares masks with: each has confirmed the other.

        Raises:
            RoundError: too few clients are left.
        """
        if not self._partners:
            left = set(self._confirmed)
            while True:
                found = {
                    client: frozenset(
                        other for other in self._confirmed[client] & left if client in self._confirmed[other]
                    )
                    for client in left
                }
                short = {client for client, others in found.items() if len(others) + 1 < self._threshold}
                if not short:
                    break
                left -= short
            self._enough(found, "have enough neighbours whose shares are in order")
            self._partners = found
        return self._partners

    def take_masked(self, client: int, masked: Words) -> str | None:
        """A client's change under masks; it goes into the sum at once and is kept nowhere."""
        if client not in self._partners or client in self._present:
            return "masked change: not asked for, or given twice"
        if masked.dtype != np.uint32 or masked.shape != (self.length,):
            return f"masked change: {masked.dtype} {masked.shape} instead of uint32 {(self.length,)}"
        self.total += masked
        self._present.add(client)
        return None

    @property
    def present(self) -> frozenset[int]:
        """Those whose change is in the sum."""
        return frozenset(self._present)

    def for_unmasking(self) -> dict[int, tuple[frozenset[int], frozenset[int]]]:
        """For each client in the sum, those of its neighbourhood that are in it, and those that are lost.

        After it nobody can be added.

        Raises:
            RoundError: there are fewer than a sum must have, or some secret can no longer be opened. Nobody
                has been asked for a share then.
        """
        self._enough(self._present, "sent a change")
        here = self.present
        self._seeds = {client: {} for client in here}
        self._lost = {c: {} for c, others in self._partners.items() if c not in here and others & here}
        for client in (*self._seeds, *self._lost):
            holders = len((self._partners[client] | {client}) & here)
            if holders < self._threshold:
                raise RoundError(
                    f"secure aggregation: {holders} that hold shares of client {client} are left, "
                    f"{self._threshold} are needed; nothing was opened"
                )
        return {c: ((self._partners[c] | {c}) & here, self._partners[c] - here) for c in sorted(here)}

    def take_revealed(self, client: int, revealed: Revealed) -> str | None:
        """A client's shares; one that is not what its dealer has committed to refuses them all."""
        if client not in self._present or client in self._revealed:
            return "shares: not asked for, or given twice"
        near = self._partners[client] | {client}
        here, lost = near & self._present, near - self._present
        if revealed.seeds.keys() != here or revealed.keys.keys() != lost:
            return "shares: not one for each that was asked for"
        for kind, shares in (("seed", revealed.seeds), ("key", revealed.keys)):
            for dealer, share in shares.items():
                if shamir.commitment(share) != self._committed(dealer, client, kind):
                    return f"shares: that of client {dealer} is not the one it was given"
        self._revealed.add(client)
        for found, given in ((self._seeds, revealed.seeds), (self._lost, revealed.keys)):
            for dealer, share in given.items():
                found[dealer][places(dealer, self._graph[dealer])[client]] = share
        return None

    @property
    def ready(self) -> bool:
        """Whether enough shares are here to open the sum."""
        return all(len(s) >= self._threshold for s in (*self._seeds.values(), *self._lost.values()))

    def open(self) -> Words:
        """The sum of the encoded changes of those that are present.

        Raises:
            RoundError: too few shares came, or a client's shares do not give what it has committed to.
        """
        if not self.ready:
            raise RoundError(
                f"secure aggregation: {len(self._revealed)} of {len(self._present)} clients gave shares, "
                f"not {self._threshold} of every neighbourhood; the round's sum stays closed"
            )
        total = self.total.copy()
        for client, shares in self._seeds.items():
            seed = shamir.combine(shares, self._threshold)
            if shamir.commitment(seed) != self._keys[client].seed:
                raise _inconsistent(client)
            masks.add_mask(total, masks.self_key(seed, self.session), negative=True)
        for client, shares in self._lost.items():
            private = shamir.combine(shares, self._threshold)
            if masks.public_key(private) != self._keys[client].mask:
                raise _inconsistent(client)
            for other in self._partners[client] & self._present:
                key = masks.pairwise_key(private, self._keys[other].mask, self.session)
                masks.add_mask(total, key, negative=not masks.sign_of(other, client))
        return total

    @property
    def _threshold(self) -> int:
        assert self.degree is not None  # noqa: S101 - set with the graph
        return self.degree.threshold

    def _committed(self, dealer: int, holder: int, kind: str) -> bytes:
        dealt = self._dealt[dealer]
        if dealer == holder:
            return dealt.own_seed if kind == "seed" else dealt.own_key
        box = dealt.boxes[holder]
        return box.seed if kind == "seed" else box.key

    def _enough(self, clients: Collection[int], what: str) -> None:
        if len(clients) < self.least:
            raise RoundError(
                f"secure aggregation: {len(clients)} of {len(self.asked)} clients {what}, {self.least} are "
                "needed; nothing was opened"
            )


def _inconsistent(client: int) -> RoundError:
    return RoundError(
        f"secure aggregation: the shares that client {client} dealt do not give its secret; the round is "
        "lost, and the client should be left out of the next"
    )
