"""Opening what is sealed on a device: with its own key, after the download, and only what was signed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedge import delta
from fedge.artefact import pack
from fedge.delivery import Sealing
from fedge.errors import AbsentError, DigestError, FetchError, FormatError, HealthError, SealError
from fedge.files import sha256
from fedge.manifest import VariantEntry
from fedge.sealing import DELTA, FORMAT, Place, key_id, new_key, seal, wrap
from fedge_client import installing
from fedge_client.agent import identity
from fedge_client.device import Device
from fedge_client.updater import Artefact, Installer, Opened, Record, anything
from fedge_client.updater.sealed import ContentKey, check_sealing, content_keys, unsealed
from fedge_client.updater.streams import DEFAULT_PACE

MODEL = b"bytes of a model" * 9000
WIRE = pack(MODEL)
KEY, DEVICE, PRIVATE = new_key(), "ab" * 32, X25519PrivateKey.generate()
SEALED = seal(WIRE, KEY, Place("micro", 7))
PUBLIC = PRIVATE.public_key().public_bytes_raw()
WRAPPED = wrap(KEY, PUBLIC, tier="micro", version=7, device_id=DEVICE)
SEALING = Sealing(FORMAT, key_id(KEY))


class Source:
    """A repository's files, wrapped keys among them; and what was asked for."""

    def __init__(self, **files: bytes) -> None:
        self.files = {"7.model": SEALED, f"keys/micro/7/{DEVICE}": WRAPPED, **files}
        self.asked: list[str] = []

    def fetch(self, name: str, maximum: int, offset: int = 0, /) -> Iterator[bytes]:
        self.asked.append(name)
        if name not in self.files:
            raise FileNotFoundError(name)
        yield self.files[name][offset:]


@pytest.fixture
def entry(tools: Any) -> VariantEntry:
    made: VariantEntry = tools.entry_of("micro", b"any")[0]
    return replace(
        made,
        wire_sha256=sha256(WIRE),
        wire_bytes=len(WIRE),
        installed_sha256=sha256(MODEL),
        installed_bytes=len(MODEL),
    )


def keys_of(source: Source) -> ContentKey:
    return content_keys(source.fetch, "micro", DEVICE, PRIVATE)


def artefact(sealed: bytes = SEALED) -> Artefact:
    return Artefact(
        name="7.model", version=7, length=len(sealed), sha256=sha256(sealed),
        installed_bytes=len(MODEL), installed_sha256=sha256(MODEL),
    )  # fmt: skip


def install(home: Path, source: Source, entry: VariantEntry, offered: Artefact | None = None) -> bytes:
    expand = unsealed(SEALING, entry, keys_of(source))
    installer = Installer(home, source.fetch, anything, expand=expand, pause=lambda _: None)
    installer.install(offered or artefact())
    return installer.store.open().data


def test_a_sealed_model_is_installed_and_lies_open_in_its_slot_alone(
    tmp_path: Path, entry: VariantEntry
) -> None:
    source = Source()
    assert install(tmp_path, source, entry) == MODEL
    assert source.asked == ["7.model", f"keys/micro/7/{DEVICE}"]  # the key when it is needed, and once
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size > 10_000]
    assert [str(path.relative_to(tmp_path)) for path in files] == ["slots/a/artefact"]


def test_what_runs_already_needs_no_key(tmp_path: Path, entry: VariantEntry) -> None:
    install(tmp_path, Source(), entry)
    source = Source()
    install(tmp_path, source, entry)
    assert source.asked == []


def test_a_key_that_cannot_be_had_now_costs_no_second_download(tmp_path: Path, entry: VariantEntry) -> None:
    source = Source()
    wrapped = source.files.pop(f"keys/micro/7/{DEVICE}")
    with pytest.raises(AbsentError):
        install(tmp_path, source, entry)
    source.files[f"keys/micro/7/{DEVICE}"] = wrapped
    source.files["7.model"] = b"gone"
    assert install(tmp_path, source, entry) == MODEL


@pytest.mark.parametrize(
    ("wrapped", "why"),
    [
        (WRAPPED[:-1], "bytes wrapped"),
        (WRAPPED[:-1] + bytes([WRAPPED[-1] ^ 1]), "not wrapped for this device"),
        (
            wrap(
                new_key(), PRIVATE.public_key().public_bytes_raw(), tier="micro", version=7, device_id=DEVICE
            ),
            "not the one that was signed",
        ),
    ],
    ids=["short", "changed", "another"],  # the keys are random, and every process makes its own
)
def test_a_wrong_key_installs_nothing_and_leaves_what_ran(
    tmp_path: Path, entry: VariantEntry, wrapped: bytes, why: str
) -> None:
    with pytest.raises(SealError, match=why):
        install(tmp_path, Source(**{f"keys/micro/7/{DEVICE}": wrapped}), entry)
    assert Installer(tmp_path, Source().fetch, anything).store.state().current is None


def test_a_source_that_says_more_than_a_key_is_cut_off(tmp_path: Path, entry: VariantEntry) -> None:
    with pytest.raises(FormatError, match="more than the 80 bytes"):
        install(tmp_path, Source(**{f"keys/micro/7/{DEVICE}": WRAPPED + b"x"}), entry)


@pytest.mark.parametrize(
    ("sealed", "error", "why"),
    [
        (seal(WIRE, KEY, Place("micro", 6)), SealError, "does not open at chunk 0"),
        (seal(WIRE, KEY, Place("nano", 7)), SealError, "does not open at chunk 0"),
        (seal(WIRE, new_key(), Place("micro", 7)), SealError, "another content key"),
        (
            seal(WIRE[:-1] + b"?", KEY, Place("micro", 7)),
            DigestError,
            "opens to other bytes than were signed",
        ),
    ],
    ids=["version", "tier", "key", "content"],
)
def test_a_ciphertext_of_something_else_installs_nothing_though_it_is_signed(
    tmp_path: Path, entry: VariantEntry, sealed: bytes, error: type[Exception], why: str
) -> None:
    with pytest.raises(error, match=why):
        install(tmp_path, Source(**{"7.model": sealed}), entry, artefact(sealed))


def test_metadata_that_cannot_be_of_the_variant_is_refused_before_a_download(entry: VariantEntry) -> None:
    check_sealing(SEALING, entry, len(SEALED))
    with pytest.raises(DigestError, match="the sealed model has"):
        check_sealing(SEALING, entry, len(SEALED) + 1)
    with pytest.raises(FormatError, match="format 2"):
        check_sealing(Sealing(2, key_id(KEY)), entry, len(SEALED))


def test_an_outage_is_an_outage(tmp_path: Path, entry: VariantEntry) -> None:
    def away(name: str, maximum: int, offset: int = 0, /) -> Iterator[bytes]:
        raise ConnectionError("reset")

    with pytest.raises(FetchError, match="cannot be fetched now"):
        content_keys(away, "micro", DEVICE, PRIVATE)(7, SEALING.key)


def test_bad_content_stays_in_quarantine_when_sealed_anew(tmp_path: Path, entry: VariantEntry) -> None:
    def unfit(data: bytes) -> None:
        raise HealthError("gives other answers")

    installer = Installer(tmp_path, Source().fetch, unfit, expand=unsealed(SEALING, entry, keys_of(Source())))
    with pytest.raises(HealthError, match="gives other answers"):
        installer.install(artefact())
    again = seal(WIRE, KEY, Place("micro", 8))
    with pytest.raises(HealthError, match="in quarantine"):
        installer.install(replace(artefact(again), version=8))


def test_a_sealed_delta_opens_as_a_delta_alone(
    tmp_path: Path, entry: VariantEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = SimpleNamespace(device_id=DEVICE, keys=SimpleNamespace(sealing=PRIVATE))
    monkeypatch.setattr(identity, "is_enrolled", lambda _: True)
    monkeypatch.setattr(identity.Identity, "open", lambda _: ours)
    before = MODEL[:-16] + bytes(16)
    made, record = delta.make(before, MODEL), Record("a", 6, "0" * 64, "1" * 64, len(before), "2" * 64, 0)
    release: Any = SimpleNamespace(version=7, variant=lambda _: entry)
    offered: Any = SimpleNamespace(sealing=SEALING, release=release)
    found = []
    for place in (Place("micro", 7, DELTA), Place("micro", 7), Place("micro", 6, DELTA)):
        source = Source(**{"deltas/micro/6/7": seal(made, KEY, place)})
        _, patch = installing._ways(Device(tmp_path, "micro"), offered, source.fetch, DEFAULT_PACE)
        runs = Opened(record, before, b"", returned=False)
        found.append(patch(runs, replace(artefact(), length=20_000)))
    assert found == [MODEL, None, None]  # None: the whole is fetched
