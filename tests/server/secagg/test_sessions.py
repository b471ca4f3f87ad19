"""Whole sessions of secure aggregation between members and a coordinator, with every kind of fault."""

import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding as Form
from cryptography.hazmat.primitives.serialization import PublicFormat
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fedge.errors import FedgeError, FormatError, RoundError
from fedge.identity import device_id_of, node_id_of
from fedge.secagg import masks, shamir
from fedge.secagg.encoding import EXTRAS, Encoding
from fedge.secagg.masks import Session, Words
from fedge.secagg.protocol import Box, Dealt, Keys
from fedge_client.secagg import Member
from fedge_server.secagg.coordinator import Coordinator

SIZE = 5
HERE = Session("run-1", 3, b"n" * 16)
Refused = dict[int, str]


class Device:
    """An identity key on a device."""

    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.client = node_id_of(device_id_of(self.key.public_key()))

    @property
    def point(self) -> bytes:
        return self.key.public_key().public_bytes(Form.X962, PublicFormat.CompressedPoint)

    def sign(self, content: bytes) -> bytes:
        return self.key.sign(content, ec.ECDSA(SHA256()))


class Play:
    """A session that can be stopped after each phase."""

    def __init__(self, count: int, *, seed: int = 0, neighbours: int = 0, signed: bool = False) -> None:
        draw = random.Random(seed)
        devices = [Device() for _ in range(count)] if signed else []
        ids = sorted(device.client for device in devices) or range(count)
        signer = {device.client: device for device in devices}
        self.members = {i: Member(i, HERE, draw.randbytes(32), signer.get(i)) for i in ids}
        self.server = Coordinator(HERE, frozenset(ids), SIZE, 3, draw, neighbours=neighbours, signed=signed)
        words = np.random.default_rng(seed).integers(0, 2**32, (count, SIZE), np.uint32)
        self.words: dict[int, Words] = dict(zip(ids, words, strict=True))
        self.refused: Refused = {}

    def note(self, client: int, reason: str | None) -> None:
        if reason is not None:
            self.refused[client] = reason

    def keys(
        self, *, without: frozenset[int] = frozenset(), change: Callable[[int, Keys], Keys] | None = None
    ) -> None:
        for i in self.members.keys() - without:
            keys = self.members[i].keys()
            self.note(i, self.server.take_keys(i, change(i, keys) if change else keys))

    def shares(
        self, *, without: frozenset[int] = frozenset(), change: Callable[[int, Dealt], Dealt] | None = None
    ) -> None:
        near, threshold = self.server.for_shares()
        for i in near.keys() - without:
            dealt = self.members[i].deal(near[i], threshold)
            self.note(i, self.server.take_shares(i, change(i, dealt) if change else dealt))

    def check(self, *, without: frozenset[int] = frozenset()) -> None:
        for i, boxes in self.server.for_check().items():
            if i not in without:
                self.note(i, self.server.take_check(i, self.members[i].check(boxes)))

    def masked(self, *, without: frozenset[int] = frozenset()) -> None:
        for i, partners in self.server.for_masking().items():
            if i not in without:
                self.note(i, self.server.take_masked(i, self.members[i].mask(self.words[i], partners)))

    def reveal(self, *, without: frozenset[int] = frozenset()) -> None:
        for i, (here, lost) in self.server.for_unmasking().items():
            if i not in without:
                self.note(i, self.server.take_revealed(i, self.members[i].reveal(here, lost)))

    def upto(self, phase: str) -> "Play":
        for name in ("keys", "shares", "check", "masked", "reveal"):
            if name == phase:
                return self
            getattr(self, name)()
        return self

    @property
    def expected(self) -> Words:
        total = np.zeros(SIZE, np.uint32)
        for i in self.server.present:
            total += self.words[i]
        return total


class Sessions(RuleBasedStateMachine):
    """Clients drop out in any phase; the sum is exact as long as thresholds hold, and nothing opens below."""

    play: Play
    phase: int

    @initialize(count=st.integers(3, 20), seed=st.integers(0, 2**16), sparse=st.booleans())
    def begin(self, count: int, seed: int, *, sparse: bool) -> None:
        self.play, self.phase, self.gone = (
            Play(count, seed=seed, neighbours=6 if sparse else 0),
            0,
            frozenset[int](),
        )
        self.opened: Words | None = None
        self.aborted = False

    @precondition(lambda self: not self.aborted and self.phase < 5)
    @rule(data=st.data())
    def some_drop_out(self, data: st.DataObject) -> None:
        left = sorted(self.play.members.keys() - self.gone)
        assume(left)
        lost = data.draw(st.sets(st.sampled_from(left), min_size=1, max_size=max(1, len(left) // 4)))
        self.gone = self.gone | lost

    @precondition(lambda self: not self.aborted and self.phase < 5)
    @rule()
    def go_on(self) -> None:
        name = ("keys", "shares", "check", "masked", "reveal")[self.phase]
        try:
            getattr(self.play, name)(without=self.gone)
        except RoundError:
            self.aborted = True
        self.phase += 1

    @precondition(lambda self: not self.aborted and self.phase == 5 and self.opened is None)
    @rule()
    def open(self) -> None:
        try:
            self.opened = self.play.server.open()
        except RoundError:
            self.aborted = True
            assert not self.play.server.ready

    @rule()
    def wait(self) -> None:
        """Nothing happens: there is always something to do, also when the session is over."""

    @invariant()
    def no_client_is_refused(self) -> None:
        if hasattr(self, "play"):
            assert not self.play.refused

    @invariant()
    def the_sum_is_exact(self) -> None:
        if getattr(self, "opened", None) is not None:
            assert np.array_equal(self.opened, self.play.expected)
            assert len(self.play.server.present) >= 3

    @invariant()
    def an_abort_has_a_reason(self) -> None:
        if getattr(self, "aborted", False):
            server = self.play.server
            few = len(self.play.members) - len(self.gone) < 3
            holders = 0 if server.degree is None else server.degree.threshold
            assert few or self._smallest_neighbourhood() < holders

    def _smallest_neighbourhood(self) -> int:
        graph = self.play.server._graph
        left = self.play.members.keys() - self.gone
        return min((len(({i} | set(near)) & left) for i, near in graph.items()), default=0)


TestSessions = pytest.mark.slow(Sessions.TestCase)
TestSessions.settings = settings(
    max_examples=settings().max_examples * 2 // 3,
    stateful_step_count=14,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


PHASES = ("keys", "shares", "check", "masked", "reveal")


@pytest.mark.parametrize(("count", "lost"), [(4, 1), (7, 2), (20, 8)])
@pytest.mark.parametrize("phase", PHASES)
def test_drop_outs_at_every_phase_leave_the_sum_exact(count: int, lost: int, phase: str) -> None:
    play, gone = Play(count).upto(phase), frozenset(range(lost))
    for name in PHASES[PHASES.index(phase) :]:
        getattr(play, name)(without=gone)
    assert np.array_equal(play.server.open(), play.expected)
    assert len(play.server.present) == (count if phase == "reveal" else count - lost)


@pytest.mark.parametrize("phase", PHASES[:4])
def test_of_three_clients_none_may_be_lost_before_the_sum(phase: str) -> None:
    play = Play(3).upto(phase)
    getattr(play, phase)(without=frozenset({0}))
    with pytest.raises(RoundError, match="3 are needed"):
        getattr(play, PHASES[PHASES.index(phase) + 1])()


def test_changes_come_out_as_their_weighted_mean() -> None:
    encoding, draw = Encoding(1.0, 100, 10), np.random.default_rng(1)
    play, size = Play(10), SIZE - EXTRAS
    changes, examples = draw.normal(0, 0.2, (10, size)), draw.integers(1, 100, 10)
    play.words = {i: encoding.encode(changes[i].copy(), int(examples[i]), 1.0) for i in range(10)}
    for name in ("keys", "shares", "check", "masked", "reveal"):
        getattr(play, name)(without=frozenset({4}) if name == "masked" else frozenset())
    found = encoding.decode(play.server.open())
    kept = [i for i in range(10) if i != 4]
    mean = np.average(changes[kept], axis=0, weights=examples[kept])
    assert found.clients == 9
    assert np.abs(found.mean - mean).max() <= encoding.error(9, found.examples) * (1 + 1e-9)


def test_below_the_threshold_no_share_is_asked_for() -> None:
    play = Play(8).upto("masked")
    play.masked(without=frozenset(range(4)))
    with pytest.raises(RoundError, match="nothing was opened"):
        play.server.for_unmasking()
    assert all(member.told is None for member in play.members.values())


def test_too_few_shares_keep_the_sum_closed() -> None:
    play = Play(8).upto("reveal")
    play.reveal(without=frozenset(range(4)))
    assert not play.server.ready
    with pytest.raises(RoundError, match="stays closed"):
        play.server.open()


def test_what_the_server_received_fits_other_updates_just_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """Move weight from one client to another: with another mask between the two all bytes stay the same.

    Nothing that the server has decides that mask: it grows from a key of which it saw only public halves.
    """
    moved = np.arange(1, SIZE + 1, dtype=np.uint32)
    other = Play(6)
    other.words[2] = other.words[2] + moved
    other.words[4] = other.words[4] - moved
    shared = masks.pairwise_key(other.members[2]._key, masks.public_key(other.members[4]._key), HERE)
    plain = masks.add_mask

    def shifted(total: Words, key: bytes, *, negative: bool = False) -> None:
        plain(total, key, negative=negative)
        if key == shared:  # client 2 adds this mask, client 4 takes it away
            total += moved if negative else -moved

    singles: list[dict[int, Words]] = []
    for at, patched in ((Play(6), plain), (other, shifted)):
        monkeypatch.setattr(masks, "add_mask", patched)
        at.upto("masked")
        partners = at.server.for_masking()
        singles.append({i: at.members[i].mask(at.words[i], partners[i]) for i in partners})
    assert all(np.array_equal(singles[0][i], singles[1][i]) for i in singles[0])


def test_a_masked_change_alone_is_noise() -> None:
    play = Play(6).upto("masked")
    partners = play.server.for_masking()
    zeros = np.zeros(20_000, np.uint32)
    words = play.members[1].mask(zeros, partners[1])
    assert abs(float(words.mean()) / 2**32 - 0.5) < 0.02
    assert len(np.unique(words)) > 19_900


def _tampered(dealt: Dealt, change: Callable[[Box], Box]) -> Dealt:
    return replace(dealt, boxes={i: change(box) for i, box in dealt.boxes.items()})


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(
            lambda box: replace(box, sealed=box.sealed[:-1] + bytes([box.sealed[-1] ^ 1])), id="tampered"
        ),
        pytest.param(lambda box: replace(box, sealed=bytes(len(box.sealed))), id="made up"),
        pytest.param(lambda box: replace(box, seed=box.key, key=box.seed), id="kinds swapped"),
    ],
)
def test_a_dealer_of_wrong_shares_is_dropped_before_anybody_masks(change: Callable[[Box], Box]) -> None:
    play = Play(7).upto("shares")
    play.shares(change=lambda i, dealt: _tampered(dealt, change) if i == 3 else dealt)
    play.check()
    assert 3 not in play.server.for_masking()
    play.masked()
    play.reveal()
    assert np.array_equal(play.server.open(), play.expected)
    assert len(play.server.present) == 6


def test_boxes_that_were_swapped_between_receivers_are_refused() -> None:
    play = Play(7).upto("shares")

    def swap(i: int, dealt: Dealt) -> Dealt:
        others = sorted(dealt.boxes)
        turned = dict(zip(others, [dealt.boxes[o] for o in [*others[1:], others[0]]], strict=True))
        return replace(dealt, boxes=turned) if i == 3 else dealt

    play.shares(change=swap)
    play.check()
    assert 3 not in play.server.for_masking()


def test_boxes_of_an_earlier_session_are_refused() -> None:
    earlier = Play(7)
    for member in earlier.members.values():
        member.session = Session("run-1", 2, b"n" * 16)
    earlier.server.session = Session("run-1", 2, b"n" * 16)
    earlier.keys()
    near, threshold = earlier.server.for_shares()
    old = earlier.members[3].deal(near[3], threshold)
    play = Play(7).upto("shares")
    play.shares(change=lambda i, dealt: old if i == 3 else dealt)
    play.check()
    assert 3 not in play.server.for_masking()


def test_a_share_out_of_range_is_refused() -> None:
    play = Play(7).upto("shares")
    dealer, others = play.members[3], [i for i in range(7) if i != 3]

    def high(i: int, dealt: Dealt) -> Dealt:
        if i != 3:
            return dealt
        big = b"\xff" * 32
        boxes = {
            o: Box(
                masks.seal(dealer._channel, play.members[o].keys().channel, HERE, 3, o, big + big),
                shamir.commitment(big),
                shamir.commitment(big),
            )
            for o in others
        }
        return replace(dealt, boxes=boxes)

    play.shares(change=high)
    play.check()
    assert 3 not in play.server.for_masking()


def test_a_client_that_reveals_a_wrong_share_is_left_out() -> None:
    play = Play(7).upto("reveal")
    for i, (here, lost) in play.server.for_unmasking().items():
        revealed = play.members[i].reveal(here, lost)
        if i == 5:
            revealed = replace(revealed, seeds={**revealed.seeds, 2: bytes(32)})
        play.note(i, play.server.take_revealed(i, revealed))
    assert list(play.refused) == [5]
    assert "client 2" in play.refused[5]
    assert np.array_equal(play.server.open(), play.expected)


def test_shares_that_do_not_give_the_secret_lose_the_round_and_name_the_dealer() -> None:
    play, other = Play(7), shamir.commitment(bytes(32))
    play.keys(change=lambda i, keys: replace(keys, seed=other) if i == 3 else keys)
    for phase in (play.shares, play.check, play.masked, play.reveal):
        phase()
    assert not play.refused
    with pytest.raises(RoundError, match="client 3 dealt"):
        play.server.open()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda i, keys, first: replace(keys, mask=first.mask), "another client has the same"),
        (lambda i, keys, first: replace(keys, mask=bytes(32)), "none of X25519"),
        (lambda i, keys, first: replace(keys, channel=keys.mask), "another client has the same"),
    ],
)
def test_public_keys_that_cannot_be_a_clients_own_are_refused(
    change: Callable[[int, Keys, Keys], Keys], reason: str
) -> None:
    play = Play(5)
    first = play.members[0].keys()
    play.server.take_keys(0, first)
    assert reason in (play.server.take_keys(1, change(1, play.members[1].keys(), first)) or "")
    assert "twice" in (play.server.take_keys(0, first) or "")
    assert "not asked" in (play.server.take_keys(77, play.members[1].keys()) or "")


def test_devices_sign_their_keys_and_refuse_those_of_others() -> None:
    play = Play(4, signed=True).upto("shares")
    assert not play.refused
    near, threshold = play.server.for_shares()
    mine, other = sorted(near)[:2]
    member = play.members[mine]
    forged = replace(near[mine][other], mask=masks.public_key(b"x" * 32))
    for keys in (forged, replace(near[mine][other], signature=b"", identity=b"")):
        with pytest.raises(FedgeError, match=f"client {other}"):
            Member(mine, HERE, member.root, member.signer).deal({**near[mine], other: keys}, threshold)
    late = Coordinator(
        Session("run-1", 4, b"n" * 16), frozenset(near), SIZE, 3, random.Random(1), signed=True
    )
    assert "not signed" in (late.take_keys(mine, member.keys()) or "")
    stolen = Coordinator(HERE, frozenset({*near, 5}), SIZE, 3, random.Random(1), signed=True)
    assert "another device" in (stolen.take_keys(5, member.keys()) or "")


def test_a_member_answers_no_second_different_request() -> None:
    play = Play(6).upto("masked")
    near, threshold = play.server.for_shares()
    member = play.members[2]
    assert member.deal(near[2], threshold) == play.server._dealt[2]  # the same request: the same answer
    fewer = {i: near[2][i] for i in sorted(near[2])[:-1]}
    with pytest.raises(FormatError, match="other neighbours before"):
        member.deal(fewer, threshold)
    play.masked()
    with pytest.raises(FormatError, match="before"):
        member.mask(play.words[2], play.server.for_masking()[2])
    everybody = frozenset(range(6))
    member.reveal(everybody, frozenset())
    with pytest.raises(FormatError, match="told before"):
        member.reveal(everybody - {5}, frozenset({5}))


@pytest.mark.parametrize(
    ("here", "lost"),
    [
        ({0, 1, 2, 3, 4, 5}, {5}),
        ({2, 1}, {0, 3, 4, 5}),
        ({0, 1, 3, 4, 5}, {2}),
        ({0, 1, 2, 3, 4}, set()),
        ({0, 1, 2, 3, 4, 5, 9}, set()),
    ],
)
def test_a_member_refuses_to_open_what_it_should_not(here: set[int], lost: set[int]) -> None:
    play = Play(6).upto("masked")
    play.masked()
    with pytest.raises(FormatError):
        play.members[2].reveal(here, lost)


def test_a_server_that_tells_neighbours_different_things_gets_one_kind_of_secret_alone() -> None:
    play = Play(9).upto("masked")
    play.masked()
    threshold = play.server.degree.threshold  # type: ignore[union-attr]
    everybody = frozenset(range(9))
    kinds: dict[str, dict[int, bytes]] = {"seed": {}, "key": {}}
    for i in sorted(everybody - {4}):  # half are told that 4 is there, half that it is lost
        lost = frozenset({4}) if i % 2 else frozenset[int]()
        revealed = play.members[i].reveal(everybody - lost, lost)
        kinds["seed"] |= {i + 1: revealed.seeds[4]} if 4 in revealed.seeds else {}
        kinds["key"] |= {i + 1: revealed.keys[4]} if 4 in revealed.keys else {}
    assert min(len(shares) for shares in kinds.values()) < threshold


def test_masked_changes_of_another_size_or_client_are_refused() -> None:
    play = Play(5).upto("masked")
    partners = play.server.for_masking()
    masked = play.members[1].mask(play.words[1], partners[1])
    assert "uint32" in (play.server.take_masked(1, masked[:-1]) or "")
    assert "uint32" in (play.server.take_masked(1, masked.astype(np.int64)) or "")
    assert play.server.take_masked(1, masked) is None
    assert "twice" in (play.server.take_masked(1, masked) or "")
    assert "not asked" in (play.server.take_masked(9, masked) or "")
