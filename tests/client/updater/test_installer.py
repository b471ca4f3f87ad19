"""Installing what verified metadata names: which, from where, into which slot, and what if it is bad."""

from __future__ import annotations

import lzma
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge.errors import (
    AbsentError,
    DigestError,
    DowngradeError,
    FedgeError,
    FetchError,
    FormatError,
    HealthError,
    SlowError,
    TrustError,
    UserError,
)
from fedge.files import sha256
from fedge.golden import Golden
from fedge.inference import CompactModel
from fedge_client.updater import Artefact, Installer, Pace, Record, State, anything, model_check
from fedge_client.updater.health import compare
from fedge_client.updater.installer import decide
from fedge_client.updater.store import MAX_QUARANTINED, MAX_TRIALS

CONTENT = {version: random.Random(version).randbytes(200_000 + version) for version in range(1, 9)}


def artefact(version: int, *, floor: int = 0, content: bytes | None = None) -> Artefact:
    data = CONTENT[version] if content is None else content
    return Artefact(
        name=f"objects/{version}", version=version, length=len(data), sha256=sha256(data), floor=floor
    )


class Source:
    """A transport whose answers a test bends: `bend` is given the chunks of an honest one."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []  # name, offset
        self.bytes = 0  # given
        self.bend: Callable[[Iterator[bytes]], Iterator[bytes]] = lambda chunks: chunks

    def __call__(self, name: str, maximum: int, offset: int = 0, /) -> Iterator[bytes]:
        self.asked.append((name, offset))
        data = CONTENT[int(name.rpartition("/")[2])]
        for chunk in self.bend(data[i : i + 8192] for i in range(offset, len(data), 8192)):
            self.bytes += len(chunk)
            yield chunk


@pytest.fixture
def source() -> Source:
    return Source()


@pytest.fixture
def installer(tmp_path: Path, source: Source) -> Installer:
    return Installer(tmp_path / "home", source, anything, pause=lambda _: None)


def runs(installer: Installer) -> int:
    opened = installer.store.open()
    assert opened.data == CONTENT[opened.record.version]
    return opened.record.version


# Which


def test_versions_alternate_between_the_slots_and_the_one_before_is_kept(installer: Installer) -> None:
    seen = []
    for version in (1, 2, 3):
        state = installer.install(artefact(version))
        assert state.current is not None
        seen.append((state.current.slot, state.previous and state.previous.version))
        assert runs(installer) == version
    assert seen == [("a", None), ("b", 1), ("a", 2)]
    assert not list((installer.store.home / "parts").iterdir())


def test_what_runs_already_is_not_fetched_again(installer: Installer, source: Source) -> None:
    installer.install(artefact(1))
    installer.install(artefact(1))
    assert source.asked == [("objects/1", 0)]


def test_an_older_version_is_refused(installer: Installer) -> None:
    installer.install(artefact(2))
    with pytest.raises(DowngradeError, match="older than the installed 2"):
        installer.install(artefact(1))


def test_one_version_with_two_contents_is_refused(installer: Installer) -> None:
    installer.install(artefact(2))
    with pytest.raises(TrustError, match="must not be signed twice"):
        installer.install(artefact(2, content=b"other"))


def test_nothing_below_the_signed_floor_is_installed_after_a_restart_either(
    installer: Installer, tmp_path: Path, source: Source
) -> None:
    installer.raise_floor(3)  # at enrolment
    again = Installer(tmp_path / "home", source, anything)
    for version in (1, 2):
        with pytest.raises(DowngradeError, match="below this device's floor 3"):
            again.install(artefact(version))
    assert again.install(artefact(4)).floor == 3
    assert again.raise_floor(1).floor == 3  # it never falls


def test_a_floor_above_what_runs_holds_for_what_comes_and_is_reached_by_the_next_commit(
    installer: Installer,
) -> None:
    installer.install(artefact(1))
    installer.install(artefact(2))
    state = installer.raise_floor(4)
    assert (state.floor, state.lowest) == (0, 4)
    assert installer.raise_floor(3).lowest == 4
    assert runs(installer) == 2  # a device answers, whatever it cannot fetch
    with pytest.raises(DowngradeError, match="floor 4"):
        installer.install(artefact(3))
    with pytest.raises(UserError, match="below this device's floor 4"):
        installer.return_to_previous()
    current = installer.store.file("b").read_bytes()
    installer.store.file("b").write_bytes(b"damaged")
    with pytest.raises(TrustError):  # nor is the one before opened in its place
        installer.store.open()
    installer.store.file("b").write_bytes(current)
    state = installer.install(artefact(5, floor=5))
    assert (state.floor, state.announced) == (5, 0)


def test_the_floor_rises_with_metadata_that_brings_nothing_else_new(installer: Installer) -> None:
    installer.install(artefact(1))
    installer.install(artefact(3))
    assert installer.install(artefact(3, floor=2)).floor == 2
    with pytest.raises(UserError, match="below this device's floor 2"):
        installer.return_to_previous()


def test_a_local_return_goes_one_step_back_and_the_version_left_is_not_taken_again(
    installer: Installer,
) -> None:
    for version in (1, 2):
        installer.install(artefact(version))
    installer.return_to_previous()
    assert runs(installer) == 1
    with pytest.raises(UserError, match="no previous version"):
        installer.return_to_previous()
    installer.install(artefact(2))
    assert runs(installer) == 1
    installer.install(artefact(2), again=True)
    assert runs(installer) == 2


def test_a_return_below_the_floor_is_refused(installer: Installer) -> None:
    installer.install(artefact(1))
    installer.install(artefact(2, floor=2))
    with pytest.raises(UserError, match="below this device's floor 2"):
        installer.return_to_previous()


@pytest.mark.slow
@given(
    versions=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9), st.booleans()), max_size=12),
    returns=st.sets(st.integers(0, 11)),
)
def test_no_sequence_brings_what_runs_below_the_floor_or_lowers_it(
    versions: list[tuple[int, int, bool]], returns: set[int]
) -> None:
    state, digest = State(), "0" * 64
    for step, (version, floor, quarantine) in enumerate(versions):
        before = state
        state = state.with_floor(floor)
        try:
            offered = Artefact(name="x", version=version, length=1, sha256=f"{version:064x}", floor=0)
            if decide(state, offered, whole=True):
                record = Record(state.free_slot, version, offered.sha256, digest, 1, digest, 0)
                state = state.committed(record, kept=state.current)
            if step in returns:
                state = state.returned()[1]
            if quarantine:
                state = state.with_quarantined(offered.sha256)
        except (TrustError, UserError):
            pass
        assert state.floor >= before.floor
        assert state.current is None or state.current.version >= state.floor
        assert State.from_bytes(state.to_bytes()) == state


@pytest.mark.parametrize(
    "change",
    [{"version": 0}, {"floor": 3}, {"length": 0}, {"length": 2**40}, {"sha256": "../x"}, {"sha256": "A" * 64},
     {"installed_bytes": 4}, {"installed_bytes": 2**40, "installed_sha256": "0" * 64}],
)  # fmt: skip
def test_an_artefact_that_cannot_be_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(FormatError):
        replace(artefact(2), **change)


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[" * 5000, b"\xff", b'{"schema": 2}', b'{"schema": 1, "current": {"slot": "c"}}'],
)
def test_a_damaged_state_is_said_to_be_damaged(installer: Installer, content: bytes) -> None:
    installer.install(artefact(1))
    (installer.store.home / "current").write_bytes(content)
    with pytest.raises(FormatError, match="damaged"):
        installer.store.open()


def test_a_state_below_its_own_floor_is_damaged(installer: Installer) -> None:
    installer.install(artefact(2, floor=2))
    path = installer.store.home / "current"
    path.write_bytes(path.read_bytes().replace(b'"floor": 2', b'"floor": 3'))
    with pytest.raises(FormatError, match="version 2 is below floor 3"):
        installer.store.open()


def test_nothing_installed_is_said_so(installer: Installer) -> None:
    with pytest.raises(UserError, match="nothing is installed"):
        installer.store.open()


def test_what_was_signed_about_an_artefact_is_kept_with_it_and_checked(installer: Installer) -> None:
    installer.install(replace(artefact(1), notes=b"one"))
    installer.install(replace(artefact(2), notes=b"two"))
    assert installer.store.open().notes == b"two"
    installer.store.file("b", "notes").write_bytes(b"tw0")
    opened = installer.store.open()
    assert (opened.record.version, opened.notes, opened.returned) == (1, b"one", True)
    with pytest.raises(FormatError, match="bytes of notes"):
        replace(artefact(3), notes=bytes(8 * 1024**2 + 1))


# From where


def test_an_endless_stream_is_cut_at_the_signed_length(installer: Installer, source: Source) -> None:
    def endless(chunks: Iterator[bytes]) -> Iterator[bytes]:
        yield from chunks
        for _ in range(2000):  # as good as endless, and what does not cut it fails soon
            yield bytes(8192)

    source.bend = endless
    with pytest.raises(FormatError, match="more than the 200001 bytes came"):
        installer.install(artefact(1))
    assert source.bytes < 200_001 + 2 * 8192
    assert (installer.store.home / "parts" / artefact(1).sha256).stat().st_size == 0  # none of it is kept


def test_a_short_stream_is_refused_and_its_bytes_are_kept(installer: Installer, source: Source) -> None:
    source.bend = lambda chunks: (chunk for i, chunk in enumerate(chunks) if i < 5 and len(source.asked) == 1)
    with pytest.raises(FetchError, match="ends after 40960 of 200001 bytes"):
        installer.install(artefact(1))
    source.bend = lambda chunks: chunks
    installer.install(artefact(1))
    assert source.asked[-1] == ("objects/1", 40960)
    assert source.bytes == 200_001


def test_a_stream_that_breaks_off_is_taken_up_where_it_did(installer: Installer, source: Source) -> None:
    def breaks(chunks: Iterator[bytes]) -> Iterator[bytes]:
        for i, chunk in enumerate(chunks):
            if i == 6:
                raise ConnectionResetError("reset by peer")
            yield chunk

    source.bend = breaks
    installer.install(artefact(1))
    assert [offset for _, offset in source.asked] == [0, 49152, 98304, 147456, 196608]
    assert source.bytes == 200_001


def test_a_source_that_is_away_is_asked_a_few_times(installer: Installer, source: Source) -> None:
    def away(chunks: Iterator[bytes]) -> Iterator[bytes]:
        raise TimeoutError("timed out")
        yield

    source.bend = away
    with pytest.raises(FetchError, match="timed out"):
        installer.install(artefact(1))
    assert len(source.asked) == 4


def test_a_source_that_has_it_not_is_asked_once(installer: Installer, source: Source) -> None:
    def absent(chunks: Iterator[bytes]) -> Iterator[bytes]:
        raise AbsentError("objects/1: gone")
        yield

    source.bend = absent
    with pytest.raises(AbsentError):
        installer.install(artefact(1))
    assert len(source.asked) == 1


def test_a_byte_for_each_connection_is_not_waited_for_forever(installer: Installer, source: Source) -> None:
    source.bend = lambda chunks: iter([next(chunks)[:1]])
    with pytest.raises(FetchError, match="ends after 11 of"):
        installer.install(artefact(1))
    assert len(source.asked) == 8 + 200_001 // 65536


def test_a_flipped_bit_is_refused_and_what_ran_runs_on(installer: Installer, source: Source) -> None:
    installer.install(artefact(1))
    source.bend = lambda chunks: (bytes([chunk[0] ^ 1]) + chunk[1:] for chunk in chunks)
    with pytest.raises(DigestError, match="not those that were signed"):
        installer.install(artefact(2))
    assert runs(installer) == 1
    source.bend = lambda chunks: chunks
    installer.install(artefact(2))
    assert runs(installer) == 2


def test_a_part_that_the_disk_damaged_is_fetched_anew(installer: Installer, source: Source) -> None:
    parts = installer.store.home / "parts"
    parts.mkdir(parents=True)
    (parts / artefact(1).sha256).write_bytes(bytes(150_000))
    (parts / artefact(2).sha256).write_bytes(bytes(99))
    installer.install(artefact(1))
    assert [offset for _, offset in source.asked] == [150_000, 0]
    assert not list(parts.iterdir())  # what is no longer wanted goes too
    (parts / artefact(2).sha256).write_bytes(bytes(150_000))
    source.bend = lambda chunks: (bytes(len(chunk)) for chunk in chunks)
    with pytest.raises(DigestError, match="not those that were signed"):
        installer.install(artefact(2))
    assert not list(parts.iterdir())
    assert runs(installer) == 1


def test_a_stream_under_the_floor_is_cut_after_its_window(tmp_path: Path, source: Source) -> None:
    clock = iter(range(10**6))
    slow = Installer(
        tmp_path / "home", source, anything, pace=Pace(10_000, 5), seconds=lambda: next(clock),
        pause=lambda _: None,
    )  # fmt: skip
    with pytest.raises(SlowError, match="under the floor of 10000 a second"):
        slow.install(artefact(1))  # 8192 bytes a second
    fast = Installer(tmp_path / "home", source, anything, pace=Pace(8000, 5), seconds=lambda: next(clock))
    fast.install(artefact(1))


def test_a_source_that_ignores_the_offset_is_found_out(installer: Installer, tmp_path: Path) -> None:
    def fetch(name: str, maximum: int, offset: int = 0, /) -> Iterator[bytes]:
        yield CONTENT[1][:150_000] if not offset else CONTENT[1]

    with pytest.raises(FormatError, match="more than the 50001 bytes"):
        Installer(tmp_path / "home", fetch, anything, pause=lambda _: None).install(artefact(1))


def test_another_tiers_artefact_is_refused(installer: Installer, source: Source) -> None:
    other = replace(artefact(1), name="objects/2", length=len(CONTENT[2]))
    with pytest.raises(DigestError):
        installer.install(other)


# Unpacking


def test_what_travels_packed_is_installed_unpacked_and_its_digest_is_checked(tmp_path: Path) -> None:
    plain, wire = CONTENT[1], lzma.compress(CONTENT[1])
    offered = Artefact(
        name="x", version=1, length=len(wire), sha256=sha256(wire),
        installed_bytes=len(plain), installed_sha256=sha256(plain),
    )  # fmt: skip

    def fetch(name: str, maximum: int, offset: int = 0, /) -> Iterator[bytes]:
        yield wire[offset:]

    installer = Installer(tmp_path / "home", fetch, anything, expand=lambda data, _: lzma.decompress(data))
    installer.install(offered)
    assert runs(installer) == 1
    for number, patched in enumerate((plain[:-1] + b"x", None)):  # a shorter way leads elsewhere, or is none
        short = Installer(
            tmp_path / f"{number}", fetch, anything, expand=lambda data, _: lzma.decompress(data),
            patch=lambda *_: patched,  # noqa: B023 - it is called within the loop
        )  # fmt: skip
        short.install(offered)
        short.install(replace(offered, version=2))
        assert short.store.open().data == plain
    with pytest.raises(DigestError, match="unpacks to other bytes"):
        installer.install(replace(offered, version=2, installed_sha256="0" * 64))
    with pytest.raises(FormatError, match="another form"):
        installer.install(artefact(3))


# The trial


def failing(version: int) -> Callable[[bytes], None]:
    def check(data: bytes) -> None:
        if data == CONTENT[version]:
            raise HealthError("answers nonsense")

    return check


def test_a_version_that_fails_its_trial_is_not_committed_and_not_tried_again(
    tmp_path: Path, source: Source
) -> None:
    installer = Installer(tmp_path / "home", source, failing(3))
    installer.install(artefact(1))
    installer.install(artefact(2))
    with pytest.raises(HealthError, match="failed its trial"):
        installer.install(artefact(3))
    assert runs(installer) == 2
    asked = len(source.asked)
    with pytest.raises(HealthError, match="in quarantine"):
        Installer(tmp_path / "home", source, anything).install(artefact(3))
    assert len(source.asked) == asked
    installer.return_to_previous()  # the version before has not been given up for it
    assert runs(installer) == 1
    installer.install(artefact(4))


def test_what_turns_out_bad_after_the_commit_is_left_and_quarantined(installer: Installer) -> None:
    installer.install(artefact(1))
    with pytest.raises(UserError, match="no previous"):
        installer.reject_current()
    assert runs(installer) == 1
    installer.install(artefact(2))
    installer.reject_current()
    assert runs(installer) == 1
    with pytest.raises(HealthError, match="in quarantine"):
        installer.install(artefact(2), again=True)
    installer.install(artefact(3))


def test_a_version_that_kills_its_process_each_time_is_quarantined(tmp_path: Path, source: Source) -> None:
    class Killed(BaseException):
        pass

    def dies(_: bytes) -> None:
        raise Killed

    home = tmp_path / "home"
    Installer(home, source, anything).install(artefact(1))
    for _ in range(MAX_TRIALS):
        with pytest.raises(Killed):
            Installer(home, source, dies).install(artefact(2))
    assert source.asked == [("objects/1", 0), ("objects/2", 0)]  # the whole part is kept meanwhile
    with pytest.raises(HealthError, match="in quarantine"):
        Installer(home, source, anything).install(artefact(2))
    assert runs(Installer(home, source, anything)) == 1


def test_a_version_that_is_returned_to_is_tried_first(tmp_path: Path, source: Source) -> None:
    for version in (1, 2):
        Installer(tmp_path / "home", source, anything).install(artefact(version))
    back = Installer(tmp_path / "home", source, failing(1))
    with pytest.raises(HealthError, match="answers nonsense"):
        back.return_to_previous()
    assert runs(back) == 2


def test_too_little_memory_for_the_trial_is_no_fault_of_the_version(tmp_path: Path, source: Source) -> None:
    def no_memory(_: bytes) -> None:
        raise MemoryError

    with pytest.raises(HealthError, match="has not the memory"):
        Installer(tmp_path / "home", source, no_memory).install(artefact(1))
    Installer(tmp_path / "home", source, anything).install(artefact(1))


def test_the_quarantine_is_bounded() -> None:
    state = State()
    for i in range(MAX_QUARANTINED + 3):
        state = state.with_quarantined(f"{i:064x}")
    assert len(state.quarantined) == MAX_QUARANTINED
    assert state.quarantined[0] == f"{3:064x}"


def test_a_model_is_held_to_its_golden_answers(tools: Any) -> None:
    model, spec = tools.constant_model(1), tools.images
    x = np.zeros((3, *spec.shape), np.uint8)
    answers = CompactModel(model, spec).run_each(x)
    model_check(spec)(model)
    model_check(spec, Golden(x, answers, latency_s=60))(model)
    with pytest.raises(HealthError, match="golden input 0 gives"):
        model_check(spec, Golden(x, answers))(tools.constant_model(2))
    with pytest.raises(FormatError):
        model_check(spec)(b"no model")
    with pytest.raises(HealthError, match=r"answers .* to zeros"):
        model_check(spec)(tools.linear_model(spec, np.zeros((64, 3)), np.full(3, np.nan)))
    times = iter([0.0, 1.0, 1.0, 2.0, 2.0, 3.0] + [10.0, 10.1] * 30)
    model_check(spec, Golden(x, answers, latency_s=0.5), seconds=lambda: next(times))(model)  # busy at first
    with pytest.raises(HealthError, match=r"takes 100\.0 ms for an answer, over the budget of 50\.0 ms"):
        model_check(spec, Golden(x, answers, latency_s=0.05), seconds=lambda: next(times))(model)


@pytest.mark.parametrize(
    ("golden", "answer", "fits"),
    [
        ([0.60, 0.40, 0.0], [0.56, 0.44, 0.0], True),
        ([0.60, 0.40, 0.0], [0.54, 0.46, 0.0], False),  # off by .06
        ([0.52, 0.48, 0.0], [0.48, 0.52, 0.0], True),  # margin .04: another label is rounding
        ([0.54, 0.43, 0.03], [0.50, 0.47, 0.03], True),
        ([0.555, 0.445, 0.0], [0.51, 0.49, 0.0], True),
        ([0.60, 0.40, 0.0], [float("nan"), 0.40, 0.0], False),
    ],
)
def test_rounding_is_let_through_and_another_model_is_not(
    golden: list[float], answer: list[float], fits: bool
) -> None:
    wanted = Golden(np.zeros((1, 2)), np.array([golden], np.float32))
    if fits:
        compare(wanted, np.array([answer], np.float32))
    else:
        with pytest.raises(HealthError, match="golden input 0"):
            compare(wanted, np.array([answer], np.float32))


def test_golden_answers_that_cannot_be_are_refused() -> None:
    with pytest.raises(FormatError, match="one row for each input"):
        Golden(np.zeros((2, 2)), np.zeros((1, 3), np.float32))
    with pytest.raises(FormatError, match="finite"):
        Golden(np.zeros((1, 2)), np.full((1, 3), np.inf, np.float32))


# The disk


def test_a_slot_that_the_disk_damaged_gives_way_to_the_one_before_and_is_repaired(
    installer: Installer,
) -> None:
    installer.install(artefact(1))
    installer.install(artefact(2))
    installer.store.file("b").write_bytes(b"damaged")
    opened = installer.store.open()
    assert (opened.record.version, opened.returned) == (1, True)
    state = installer.install(
        artefact(2)
    )  # the same version is installed anew, and the whole one not touched
    assert state.current is not None
    assert (state.current.slot, runs(installer)) == ("b", 2)
    assert state.previous is not None
    assert installer.store.is_whole(state.previous)


def test_a_full_disk_is_seen_before_anything_is_fetched(
    installer: Installer, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    installer.install(artefact(1))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(FedgeError, match="1000 bytes are free"):
        installer.install(artefact(2))
    assert (len(source.asked), runs(installer)) == (1, 1)


def test_the_version_before_is_given_up_where_there_is_no_room_else(
    installer: Installer, monkeypatch: pytest.MonkeyPatch
) -> None:
    installer.install(artefact(1))
    installer.install(artefact(2))
    free = 300 * 1024  # with the 200 kB of version 1, enough for 200 kB and what the file system takes
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, free))
    installer.install(artefact(3))
    assert runs(installer) == 3


@pytest.mark.parametrize("step", range(1, 12))
def test_a_disk_that_refuses_at_any_step_leaves_what_ran(
    installer: Installer, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    installer.install(artefact(1))
    count = 0

    def full(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count >= step:
                raise OSError(28, "No space left on device")
            return function(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        for name in ("fsync", "replace", "mkdir"):
            patch.setattr(os, name, full(getattr(os, name)))
        try:
            installer.install(artefact(2))
        except FedgeError as error:
            assert "No space left on device" in str(error)  # noqa: PT017 - later steps do not fail
        assert runs(installer) in (1, 2)
    installer.install(artefact(2))
    assert runs(installer) == 2


@pytest.mark.slow
def test_two_installations_at_once_are_refused(tmp_path: Path, source: Source) -> None:
    home = tmp_path / "home"

    def meanwhile(_: bytes) -> None:
        Installer(home, source, anything).install(artefact(2))

    with pytest.raises(FedgeError, match="another installation is under way"):
        Installer(home, source, meanwhile).install(artefact(1))
