"""A home goes into one file while it is written to, and comes back as it was, or not at all."""

from __future__ import annotations

import gzip
import io
import json
import os
import socket
import sqlite3
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa

from fedge.errors import DigestError, FedgeError, FormatError, UserError
from fedge_server.backup import MANIFEST, Saved, backup
from fedge_server.cli import main
from fedge_server.registry.database import Registry
from fedge_server.registry.dump import copy_database, load_database
from fedge_server.registry.engine import connect, reading
from fedge_server.registry.queue import Queued
from fedge_server.restore import restore
from fedge_server.rounds.record import RoundRecord

FILES = {
    "ca/ca.key": (b"secret", 0o600),
    "tls/server.pem": (b"certificate", 0o644),
    "keys/timestamp.key": (b"secret too", 0o600),
    "repository/metadata/timestamp.json": (b"{}", 0o644),
    "repository/state/used.json": (b"{}", 0o600),
    "repository/targets/micro/" + "a" * 64 + ".1.model": (b"variant", 0o644),
    "runs/r/config.json": (b"{}", 0o644),
    "runs/r/log": (b"round 1\n", 0o640),
}
LEFT_OUT = {
    "hub.lock": b"",
    "ports.json": b"{}",
    "runs/r/worker.lock": b"",
    "objects/r/" + "b" * 64: b"going down",
    "spool/r/file": b"coming up",
    "store/.partial.abc": b"half",
    "repository/metadata/.timestamp.json.abc": b"half",
}


def commit(registry: Registry, number: int, run_id: str = "r", size: int = 3) -> str:
    model = {"w": np.full(size, number, np.float32)}
    return registry.commit_round(run_id, RoundRecord(number, {"accuracy": 0.5}), model, b"state %d" % number)


@pytest.fixture
def home(tmp_path: Path, database_url: str | None) -> Path:
    """A server's home with a run in its fifth round, and all that does not belong into a backup."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "server.toml").write_text(f'[database]\nurl = "{database_url or ""}"  # where\n')
    for name, (data, mode) in FILES.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_bytes(data)
        (home / name).chmod(mode)
    (home / "ca").chmod(0o700)
    for name, left in LEFT_OUT.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_bytes(left)
    with Registry.open(home, database_url) as registry:
        registry.begin_run("r", task="digits", seed=0, config={}, data="d")
        for number in range(5):
            commit(registry, number)
        registry.devices.create_token(token_id="t", secret_sha256="s" * 64, tier="micro", expires=2e9)
        session = registry.queue.attach("r")
        message = Queued("m", "r", session, "d", 1, "digits", "e", "train", "1", "c" * 64, 0.0, 1.0, 1)
        registry.queue.push("r", session, [message], {"c" * 64: b"body"})
    return home


@pytest.fixture
def other_url(request: pytest.FixtureRequest, database_url: str | None) -> str | None:
    """An empty database to restore into."""
    if database_url is None:
        return None
    make: Callable[[], str] = request.getfixturevalue("new_postgresql_database")
    return make()


def listed(home: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(home)): (path.read_bytes(), path.stat().st_mode & 0o777)
        for path in home.rglob("*")
        if path.is_file()
    }


@pytest.mark.slow
def test_a_home_comes_back_with_what_it_needs_to_go_on(
    tmp_path: Path, home: Path, database_url: str | None, other_url: str | None
) -> None:
    archive, new = tmp_path / "b.tar.gz", tmp_path / "new" / "home"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.path.relpath(home / "hub.sock"))
        saved = backup(home, database_url, archive)
    assert archive.stat().st_mode & 0o777 == 0o600
    assert saved.size == archive.stat().st_size
    assert saved.objects == 2  # the last round's model and state
    assert [path.name for path in tmp_path.glob(".*")] == []

    restored = restore(archive, new, other_url)
    assert restored.files == saved.files
    found = listed(new)
    assert {name: found[name] for name in FILES} == FILES
    assert (new / "ca").stat().st_mode & 0o777 == 0o700
    assert new.stat().st_mode & 0o777 == 0o700  # what lies in it may be readable, as the models are
    settings = {"server.toml"} | ({"fedge.db"} if database_url is None else set())
    assert {name for name in found if not name.startswith("store/")} == set(FILES) | settings
    assert (new / "server.toml").read_text() == f'[database]\nurl = "{other_url or ""}"  # where\n'
    with Registry.open(new, other_url) as registry:
        assert registry.devices.token("t") is not None
        assert registry.queue.open_messages() == []
        assert len(registry.records("r")) == 5
        last = registry.last_round("r")
        assert last is not None
        assert (last.record.round, last.model["w"].tolist(), last.state) == (4, [4, 4, 4], b"state 4")
        commit(registry, 5)
        assert registry.queue.attach("r")


@pytest.mark.slow
def test_a_backup_during_writes_of_another_process_is_one_state(
    tmp_path: Path, home: Path, database_url: str | None, other_url: str | None
) -> None:
    script = (
        "import sys, numpy as np; from pathlib import Path\n"
        "from fedge_server.registry.database import Registry\n"
        "from fedge_server.rounds.record import RoundRecord\n"
        "with Registry.open(Path(sys.argv[1]), sys.argv[2] or None) as r:\n"
        "    for n in range(5, 100_000):\n"
        "        model = {'w': np.full(50_000, n, np.float32)}\n"
        "        r.commit_round('r', RoundRecord(n, {'a': 0.5}), model, b'%d' % n)\n"
        "        print(n, flush=True)\n"
    )
    command = [sys.executable, "-c", script, str(home), database_url or ""]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "5\n"
        try:
            for number in range(3):
                backup(home, database_url, tmp_path / f"{number}.tar.gz")
        finally:
            writer.kill()
            written = writer.stdout.read().split()
    assert len(written) > 3
    restore(tmp_path / "2.tar.gz", tmp_path / "new", other_url)
    with Registry.open(tmp_path / "new", other_url) as registry:
        records, last = registry.records("r"), registry.last_round("r")
        assert last is not None
        assert [record.round for record in records] == list(range(len(records)))
        assert last.record == records[-1]
        assert set(last.model["w"].tolist()) == {float(last.record.round)}
        commit(registry, last.record.round + 1)  # and the run goes on


@pytest.fixture
def saved(tmp_path: Path, home: Path) -> Path:
    backup(home, None, tmp_path / "b.tar.gz")
    return tmp_path / "b.tar.gz"


sqlite = pytest.mark.parametrize("database_url", [None])


@sqlite
def test_what_cannot_become_a_backup_is_said_and_leaves_no_file(tmp_path: Path, home: Path) -> None:
    target = tmp_path / "there"
    target.write_bytes(b"mine")
    with pytest.raises(UserError, match="a backup replaces nothing"):
        backup(home, None, target)
    assert target.read_bytes() == b"mine"
    with pytest.raises(UserError, match="lies in the home itself"):
        backup(home, None, home / "runs" / "b.tar.gz")
    with pytest.raises(UserError, match="there is no folder"):
        backup(home, None, tmp_path / "absent" / "b.tar.gz")
    with pytest.raises(UserError, match="is no home of fedge"):
        backup(tmp_path, None, tmp_path / "b.tar.gz")
    with Registry.open(home) as registry:
        last = registry.last_round("r")
        assert last is not None
        registry.store.path(last.model_sha256).write_bytes(b"rubbish")
        with pytest.raises(DigestError, match="is damaged"):
            backup(home, None, tmp_path / "b.tar.gz")
        registry.store.remove(last.model_sha256)
        with pytest.raises(FedgeError, match="of the store has gone"):
            backup(home, None, tmp_path / "b.tar.gz")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "there"]


@sqlite
def test_a_folder_that_is_not_empty_is_left_alone(tmp_path: Path, saved: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "mine").write_bytes(b"1")
    with pytest.raises(UserError, match="is not an empty folder"):
        restore(saved, tmp_path / "new")
    with pytest.raises(UserError, match="is not an empty folder"):
        restore(saved, tmp_path / "new" / "mine")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["mine"]
    with pytest.raises(UserError, match="there is no such backup"):
        restore(tmp_path / "absent", tmp_path / "other")


@sqlite
def test_an_empty_folder_and_one_that_a_killed_restore_left_are_filled(tmp_path: Path, saved: Path) -> None:
    (tmp_path / "new" / ".restore" / "ca").mkdir(parents=True)
    (tmp_path / "new" / "lost+found").mkdir()
    restore(saved, tmp_path / "new")
    assert (tmp_path / "new" / "ca" / "ca.key").read_bytes() == b"secret"
    assert not (tmp_path / "new" / ".restore").exists()


@sqlite
def test_an_archive_that_is_cut_off_anywhere_leaves_nothing_behind(tmp_path: Path, saved: Path) -> None:
    data = saved.read_bytes()
    (tmp_path / "empty").mkdir()
    for share in range(12):
        saved.write_bytes(data[: len(data) * share // 12])
        for folder in ("new", "empty"):
            with pytest.raises(FormatError, match="backup"):
                restore(saved, tmp_path / folder)
    assert not (tmp_path / "new").exists()
    assert list((tmp_path / "empty").iterdir()) == []


@sqlite
def test_a_flipped_bit_anywhere_is_noticed(tmp_path: Path, saved: Path) -> None:
    plain = gzip.decompress(saved.read_bytes())
    manifest = plain.index(b'{\n "format"')
    for position in (*range(600, manifest, manifest // 40), manifest + 3):
        changed = bytearray(plain)
        if not changed[position]:
            continue  # padding of the archive
        changed[position] ^= 1
        saved.write_bytes(gzip.compress(bytes(changed), 1))
        with pytest.raises((FormatError, DigestError)):
            restore(saved, tmp_path / "new")
        assert not (tmp_path / "new").exists()


def hostile(kind: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo({"absolute": "/tmp/evil", "parent": "runs/../../evil"}.get(kind, "runs/evil"))
    member.type = {"link": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE, "pipe": tarfile.FIFOTYPE}.get(
        kind, tarfile.REGTYPE
    )
    member.linkname = "/etc/passwd" if kind == "link" else "server.toml"
    if kind == "twice":
        member.name = "server.toml"
    return member


@sqlite
@pytest.mark.parametrize("kind", ["absolute", "parent", "link", "hard", "pipe", "twice", "unlisted"])
def test_an_archive_that_reaches_out_is_refused(tmp_path: Path, saved: Path, kind: str) -> None:
    with tarfile.open(saved, "r:gz") as tar, tarfile.open(tmp_path / "evil", "w:gz") as evil:
        for member in tar:
            evil.addfile(member, tar.extractfile(member))
        evil.addfile(hostile(kind), io.BytesIO())
    with pytest.raises(FormatError, match=r"neither a file nor a folder|is there twice|not listed"):
        restore(tmp_path / "evil", tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("manifest", "said"),
    [
        (b"[]", "malformed"),
        (b"{", "malformed"),
        (b'{"format": 9, "files": {}, "fedge": "", "created": 0}', "9"),
    ],
)
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, manifest: bytes, said: str) -> None:
    with tarfile.open(tmp_path / "evil", "w:gz") as evil:
        member = tarfile.TarInfo(MANIFEST)
        member.size = len(manifest)
        evil.addfile(member, io.BytesIO(manifest))
    with pytest.raises(FormatError, match=said):
        restore(tmp_path / "evil", tmp_path / "new")


@sqlite
def test_a_damaged_database_makes_no_backup(tmp_path: Path, home: Path) -> None:
    with sqlite3.connect(home / "fedge.db") as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    data = bytearray((home / "fedge.db").read_bytes())
    data[4096 * 3 : 4096 * 4] = os.urandom(4096)
    (home / "fedge.db").write_bytes(data)
    with pytest.raises(FedgeError, match="database"):
        backup(home, None, tmp_path / "b.tar.gz")
    assert not (tmp_path / "b.tar.gz").exists()


def test_the_commands_do_the_same(
    tmp_path: Path, home: Path, other_url: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    archive, new = str(tmp_path / "b.tar.gz"), str(tmp_path / "new")
    assert main(["backup", archive, "--home", str(home), "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["objects"] == 2
    assert main(["backup", archive, "--home", str(home)]) == 2
    assert "replaces nothing" in capsys.readouterr().err
    database = ["--database", other_url] if other_url else []
    assert main(["restore", archive, "--home", new, *database]) == 0
    assert "files as they were at 20" in capsys.readouterr().out
    assert main(["restore", archive, "--home", str(tmp_path / "third"), *database]) == (2 if database else 0)
    assert main(["restore", archive, "--home", str(tmp_path / "4"), "--database", "sqlite://"]) == 2
    assert not (tmp_path / "4").exists()


def test_a_link_to_a_folder_is_followed_once(
    tmp_path: Path, home: Path, database_url: str | None, other_url: str | None
) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "file").write_bytes(b"1")
    (home / "elsewhere").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "back").symlink_to(home)
    (home / "broken").symlink_to(tmp_path / "absent")
    saved = backup(home, database_url, tmp_path / "b.tar.gz")
    assert isinstance(saved, Saved)
    restore(tmp_path / "b.tar.gz", tmp_path / "new", other_url)
    assert (tmp_path / "new" / "elsewhere" / "file").read_bytes() == b"1"
    assert not (tmp_path / "new" / "elsewhere").is_symlink()
    assert not (tmp_path / "new" / "elsewhere" / "back").exists()


def test_what_is_committed_while_the_database_is_copied_is_not_in_the_copy(
    tmp_path: Path, home: Path, database_url: str | None, other_url: str | None
) -> None:
    held: list[str] = []
    (tmp_path / "copy").mkdir()
    with Registry.open(home, database_url) as registry:

        def hold(needed: Sequence[str]) -> None:
            held.extend(needed)
            commit(registry, 5)

        copy = copy_database(registry.engine, tmp_path / "copy", hold)
        assert len(registry.records("r")) == 6
    assert copy.stat().st_mode & 0o777 == 0o600
    with closing_engine(connect(tmp_path / "copy", other_url)) as engine:
        if other_url:
            load_database(engine, copy)
        with reading(engine) as connection:
            query = sa.text("SELECT number, model, state FROM rounds ORDER BY number DESC")
            number, *digests = connection.execute(query).first()  # type: ignore[misc]
    assert (number, digests) == (4, held)


@contextmanager
def closing_engine(engine: sa.Engine) -> Iterator[sa.Engine]:
    yield engine
    engine.dispose()


@sqlite
@pytest.mark.slow
def test_a_disk_that_is_full_leaves_no_part_of_a_backup_or_a_home(tmp_path: Path, home: Path) -> None:
    (home / "runs" / "r" / "model").write_bytes(os.urandom(500_000))

    def limited(*arguments: str) -> subprocess.CompletedProcess[str]:
        script = (
            "import resource, sys; from fedge_server.cli import main\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000)); sys.exit(main(sys.argv[1:]))"
        )
        command = [sys.executable, "-c", script, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = limited("backup", str(tmp_path / "b.tar.gz"), "--home", str(home))
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert "cannot be written (File too large)" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    backup(home, None, tmp_path / "b.tar.gz")
    done = limited("restore", str(tmp_path / "b.tar.gz"), "--home", str(tmp_path / "new"))
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert "the disk refuses (File too large)" in done.stderr
    assert not (tmp_path / "new").exists()
