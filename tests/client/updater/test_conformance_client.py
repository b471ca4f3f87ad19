"""The command for TUF's conformance suite, over HTTP, as the suite calls it."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from loopback import Server
from tuf_repository import Repository

CLIENT = Path(__file__).with_name("conformance_client.py")


class Suite:
    def __init__(self, folder: Path, repository: Repository, url: str) -> None:
        self.folder, self.repository, self.url = folder, repository, url
        self.metadata, self.targets = folder / "metadata", folder / "targets"

    def __call__(self, *words: str) -> int:
        self.repository.write(self.folder / "served")
        fixed = ["--metadata-dir", str(self.metadata), "--metadata-url", self.url]
        return subprocess.run(
            [sys.executable, str(CLIENT), *fixed, *words], capture_output=True, check=False
        ).returncode

    def download(self, path: str) -> int:
        where = ["--target-base-url", self.url, "--target-dir", str(self.targets)]
        return self("--target-name", path, *where, "download")

    def downloaded(self) -> list[bytes]:
        return [path.read_bytes() for path in self.targets.glob("*")]

    def versions(self) -> dict[str, int]:
        return {
            path.stem: json.loads(path.read_bytes())["signed"]["version"]
            for path in self.metadata.glob("*.json")
        }


@pytest.mark.slow
def test_the_conformance_client_initialises_refreshes_and_downloads(tmp_path: Path) -> None:
    repository = Repository()
    later = datetime.now(UTC) + timedelta(days=400)
    for payload in (repository.root, repository.timestamp, repository.snapshot, *repository.targets.values()):
        payload.expires = later
    repository.publish_root()
    repository.add("targets", "a/b", b"content")
    repository.publish_targets()
    repository.publish()
    (tmp_path / "served").mkdir()
    with Server(tmp_path / "served") as server:
        suite = Suite(tmp_path, repository, server.url)
        (tmp_path / "first").write_bytes(repository.trusted_root)
        assert suite("init", str(tmp_path / "first")) == 0
        assert server.paths == []
        assert suite("refresh") == 0
        assert suite.versions() == {"root": 2, "timestamp": 2, "snapshot": 2, "targets": 2}
        assert suite.download("a/b") == 0
        assert suite.download("missing") == 1
        assert suite.downloaded() == [b"content"]
        server.paths.clear()
        assert suite.download("a/b") == 0  # it is there already
        assert not [path for path in server.paths if path.endswith(".b")]
        assert suite("--days-in-future", "401", "refresh") == 1
        (name,) = [name for name in repository.files if name.endswith(".b")]
        repository.add("targets", "a/b", b"changed")
        repository.publish_targets()
        repository.publish()
        assert suite.download("a/b") == 0
        assert suite.downloaded() == [b"changed"]
        repository.files = {
            file: b"forged!" if file.endswith(".b") else data for file, data in repository.files.items()
        }
        (suite.targets / "a%2Fb").unlink()
        assert suite.download("a/b") == 1
        assert suite.downloaded() == []
        assert name.startswith("a/")
