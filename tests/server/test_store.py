from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from fedge.errors import DigestError, FedgeError, FormatError
from fedge_server.registry.store import ContentStore

DATA = b"hello"
DIGEST = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"


@pytest.fixture
def store(tmp_path: Path) -> ContentStore:
    return ContentStore(tmp_path / "objects")


def test_bytes_are_found_again_by_their_digest(store: ContentStore) -> None:
    assert not store.has(DIGEST)
    assert store.put(DATA) == DIGEST
    assert store.has(DIGEST)
    assert store.get(DIGEST) == store.get(DIGEST, max_bytes=5) == DATA
    assert store.path(DIGEST) == store.folder / "2c" / DIGEST[2:]
    assert [path.name for path in store.folder.rglob("*") if path.is_file()] == [DIGEST[2:]]


def test_putting_the_same_bytes_again_writes_nothing(store: ContentStore) -> None:
    store.put(DATA)
    before = store.path(DIGEST).stat()
    assert store.put(DATA) == DIGEST
    assert store.path(DIGEST).stat().st_ino == before.st_ino


def test_empty_bytes_are_bytes(store: ContentStore) -> None:
    assert store.get(store.put(b"")) == b""


def test_damaged_bytes_are_refused_and_mended_by_the_next_put(store: ContentStore) -> None:
    store.put(DATA)
    store.path(DIGEST).write_bytes(b"hellO")
    with pytest.raises(DigestError, match="damaged"):
        store.get(DIGEST)
    store.put(DATA)
    assert store.get(DIGEST) == DATA


def test_a_maximum_is_kept(store: ContentStore) -> None:
    store.put(DATA)
    with pytest.raises(FormatError, match="longer than the 4"):
        store.get(DIGEST, max_bytes=4)


@pytest.mark.parametrize(
    "digest", ["", "2cf2", DIGEST.upper(), "../" + DIGEST[3:], DIGEST + "/", "/etc/passwd"]
)
def test_a_digest_that_is_none_is_refused_before_the_disk_is_touched(
    store: ContentStore, digest: str
) -> None:
    for call in (store.get, store.has, store.path, store.remove):
        with pytest.raises(FormatError, match="no SHA-256"):
            call(digest)


def test_an_absent_object_is_our_error_and_can_be_removed(store: ContentStore) -> None:
    with pytest.raises(FormatError, match="cannot be read"):
        store.get(DIGEST)
    store.remove(DIGEST)
    store.put(DATA)
    store.remove(DIGEST)
    assert not store.has(DIGEST)


def test_a_full_disk_leaves_no_part_of_an_object(
    store: ContentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def count() -> int:
        return sum(path.is_file() for path in store.folder.rglob("*"))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(FedgeError, match="No space left on device"):
            store.put(DATA)
    assert count() == 0
    assert store.get(store.put(DATA)) == DATA


def test_objects_of_any_size_keep_their_digest(store: ContentStore) -> None:
    for size in (0, 1, 4096, 100_003):
        data: Any = os.urandom(size)
        assert store.put(data) == hashlib.sha256(data).hexdigest()
        assert store.get(hashlib.sha256(data).hexdigest()) == data


def test_a_stream_is_kept_as_the_same_object(store: ContentStore) -> None:
    assert store.put_stream([b"he", memoryview(b"l"), bytearray(b"lo")]) == DIGEST
    assert store.get(DIGEST) == DATA
    with store.open(DIGEST) as file:
        assert file.read() == DATA
    assert [path.name for path in store.folder.rglob("*") if path.is_file()] == [DIGEST[2:]]
    assert store.path(DIGEST).stat().st_mode & 0o777 == 0o644


def test_a_stream_mends_a_damaged_object(store: ContentStore) -> None:
    store.put(DATA)
    store.path(DIGEST).write_bytes(b"hellO")
    with pytest.raises(DigestError, match="damaged"):
        store.open(DIGEST)
    store.put_stream([DATA])
    assert store.get(DIGEST) == DATA


def test_a_stream_that_breaks_off_leaves_nothing(store: ContentStore) -> None:
    def broken() -> Iterator[bytes]:
        yield DATA
        raise FormatError("no more")

    with pytest.raises(FormatError, match="no more"):
        store.put_stream(broken())
    assert list(store.folder.iterdir()) == []


def test_a_killed_writer_leaves_a_part_that_the_next_one_removes(store: ContentStore) -> None:
    script = (
        "import os, sys; from pathlib import Path; from fedge_server.registry.store import ContentStore\n"
        "def chunks():\n    yield b'part'\n    os.kill(os.getpid(), 9)\n    yield b''\n"
        "ContentStore(Path(sys.argv[1])).put_stream(chunks())"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(store.folder)], check=False)
    assert killed.returncode == -9
    assert [path.name[:9] for path in store.folder.iterdir()] == [".partial."]

    def watching() -> Iterator[bytes]:
        yield DATA
        other = ContentStore(store.folder)  # another writer leaves alone what is being written
        assert other.put_stream([b"other"]) != DIGEST

    assert store.put_stream(watching()) == DIGEST
    assert list(store.folder.glob(".partial.*")) == []


def test_a_large_stream_is_written_and_read_without_holding_it(store: ContentStore) -> None:
    chunk = bytes(1 << 20)
    tracemalloc.start()
    digest = store.put_stream(chunk for _ in range(64))
    store.open(digest).close()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert store.path(digest).stat().st_size == 64 << 20
    assert peak < 4 << 20


def test_a_lock_that_cannot_be_taken_is_named_and_what_goes_wrong_under_it_stays_what_it_is(
    store: ContentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, modes, real = store.folder.with_name("objects.lock"), list[int](), fcntl.flock

    def flock(file: IO[str], kind: int) -> None:
        modes.append(fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE)
        real(file, kind)

    monkeypatch.setattr(fcntl, "flock", flock)
    for hold in (store.adding, store.removing):
        for wrong in (BlockingIOError(errno.EAGAIN, "a pipe is full"), OSError(errno.ENOSPC, "no space")):
            with pytest.raises(type(wrong)) as caught, hold():
                raise wrong
            assert caught.value is wrong
        lock.unlink()
        lock.mkdir()  # as little to be opened as a file of somebody else
        with pytest.raises(FedgeError, match=r"objects\.lock: cannot be locked \(Is a directory\)"), hold():
            pass
        lock.rmdir()
    assert set(modes) == {os.O_RDWR}  # NFS shares no lock on what is open to be written alone
