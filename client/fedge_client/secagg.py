"""A client's part in secure aggregation: it answers each phase once, and never gives away both of a kind."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from fedge.errors import FedgeError, FormatError
from fedge.secagg import masks, shamir
from fedge.secagg.masks import Session, Words
from fedge.secagg.protocol import (
    Box,
    Dealt,
    Keys,
    Revealed,
    Signer,
    check_neighbours,
    check_signature,
    places,
    signed_content,
)


@dataclass(slots=True)
class Member:
    """One client in one session.

    All its secrets come from `root`, so that the same request gets the same answer. A phase that was answered
    is answered again only for the same request: a server that asks twice learns nothing new.
    """

    client: int
    session: Session
    root: bytes = field(repr=False)  # 32 secret bytes for this session alone
    signer: Signer | None = None  # with one, neighbours without a valid signature are refused too
    neighbours: dict[int, Keys] = field(default_factory=dict)
    threshold: int = 0
    held: dict[int, tuple[bytes, bytes]] = field(default_factory=dict)  # shares of seed and key, by dealer
    partners: frozenset[int] | None = None
    told: tuple[frozenset[int], frozenset[int]] | None = None

    def keys(self) -> Keys:
        """Public keys of this session."""
        keys = Keys(
            masks.public_key(self._channel), masks.public_key(self._key), shamir.commitment(self._seed)
        )
        if self.signer is None:
            return keys
        signature = self.signer.sign(signed_content(self.session, self.client, keys))
        return replace(keys, identity=self.signer.point, signature=signature)

    def deal(self, neighbours: Mapping[int, Keys], threshold: int) -> Dealt:
        """Shares of both secrets, in a box for each neighbour.

        Raises:
            FormatError: the neighbourhood is unsafe, or another one than before.
            SignatureError: a neighbour's keys are not its own, or not for this session.
        """
        if self.neighbours:
            if (dict(neighbours), threshold) != (self.neighbours, self.threshold):
                raise FormatError(f"{self._name}: was asked to share with other neighbours before")
        else:
            check_neighbours(self.client, neighbours, threshold)
            used = [key for keys in neighbours.values() for key in (keys.channel, keys.mask)]
            if len({*used, masks.public_key(self._channel), masks.public_key(self._key)}) != len(used) + 2:
                raise FormatError(f"{self._name}: two neighbours have the same key, or one has this client's")
            if self.signer is not None:
                for other, keys in neighbours.items():
                    check_signature(self.session, other, keys)
            self.neighbours, self.threshold = dict(neighbours), threshold
        draw = masks.stream_of(self.root, "polynomials")
        holders = places(self.client, neighbours)
        seeds = shamir.share(self._seed, threshold, len(holders), draw)
        keys_of = shamir.share(self._key, threshold, len(holders), draw)
        own = holders[self.client] - 1
        self.held[self.client] = seeds[own], keys_of[own]
        boxes = {}
        for other, place in holders.items():
            if other != self.client:
                seed, key = seeds[place - 1], keys_of[place - 1]
                sealed = masks.seal(
                    self._channel, neighbours[other].channel, self.session, self.client, other, seed + key
                )
                boxes[other] = Box(sealed, shamir.commitment(seed), shamir.commitment(key))
        return Dealt(boxes, shamir.commitment(seeds[own]), shamir.commitment(keys_of[own]))

    def check(self, boxes: Mapping[int, Box]) -> frozenset[int]:
        """The dealers whose boxes hold shares for this client that are what their commitments say."""
        for dealer, box in boxes.items():
            if dealer not in self.neighbours or dealer in self.held:
                continue
            try:
                content = masks.unseal(
                    self._channel,
                    self.neighbours[dealer].channel,
                    self.session,
                    dealer,
                    self.client,
                    box.sealed,
                )
            except FedgeError:
                continue
            seed, key = content[: shamir.SECRET_BYTES], content[shamir.SECRET_BYTES :]
            committed = (shamir.commitment(seed), shamir.commitment(key)) == (box.seed, box.key)
            if committed and max(int.from_bytes(seed), int.from_bytes(key)) < shamir.PRIME:
                self.held[dealer] = seed, key
        return frozenset(self.held) & frozenset(boxes)

    def mask(self, encoded: Words, partners: Collection[int]) -> Words:
        """An encoded change under this client's own mask and one for each partner.

        Args:
            encoded: flat; stays as it is.
            partners: neighbours that mask too; their shares are held here.

        Raises:
            FormatError: a partner's shares are not held, there are too few, or it is the second call.
        """
        chosen = frozenset(partners)
        if self.partners is not None:
            raise FormatError(f"{self._name}: has sent its change in this round before")
        if self.client in chosen or not chosen <= self.held.keys():
            raise FormatError(f"{self._name}: masks with clients whose shares it does not hold")
        if len(chosen) + 1 < self.threshold:
            raise FormatError(
                f"{self._name}: {len(chosen)} partners are left, {self.threshold - 1} are needed"
            )
        self.partners = chosen
        total = encoded.copy()
        masks.add_mask(total, masks.self_key(self._seed, self.session))
        for other in chosen:
            key = masks.pairwise_key(self._key, self.neighbours[other].mask, self.session)
            masks.add_mask(total, key, negative=masks.sign_of(self.client, other))
        return total

    def reveal(self, present: Collection[int], lost: Collection[int]) -> Revealed:
        """A share of each seed of those that are in the sum, and of each key of those that are not.

        Args:
            present: among this client and its partners, those whose change has arrived.
            lost: the other partners.

        Raises:
            FormatError: the request asks for both kinds, leaves too few in the sum, or differs from an
                earlier one.
        """
        here, gone = frozenset(present), frozenset(lost)
        if self.told is not None and self.told != (here, gone):
            raise FormatError(f"{self._name}: was told before that others were lost")
        if self.partners is None or here & gone or here | gone != self.partners | {self.client}:
            raise FormatError(f"{self._name}: present and lost must be itself and its partners, each once")
        if self.client not in here or len(here) < self.threshold:
            raise FormatError(
                f"{self._name}: {len(here)} of its neighbourhood are in the sum, {self.threshold} are needed"
            )
        self.told = here, gone
        return Revealed(
            {other: self.held[other][0] for other in here}, {other: self.held[other][1] for other in gone}
        )

    @property
    def _name(self) -> str:
        return f"secure aggregation, client {self.client}, round {self.session.round}"

    @property
    def _channel(self) -> bytes:
        return self._secret("channel")

    @property
    def _key(self) -> bytes:
        return self._secret("mask key")

    @property
    def _seed(self) -> bytes:
        return self._secret("seed")

    def _secret(self, purpose: str) -> bytes:
        return shamir.below_prime(masks.stream_of(self.root, purpose))
