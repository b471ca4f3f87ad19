#!/usr/bin/env python3
"""The command that TUF's conformance suite drives, over this library: init, refresh, download.

pytest tuf_conformance --entrypoint tests/client/updater/conformance_client.py
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import quote
from urllib.request import urlopen

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT / "common"), str(ROOT / "client")]

from fedge.errors import FedgeError  # noqa: E402
from fedge.files import sha256  # noqa: E402
from fedge_client.updater import Artefact, Fetcher, Installer, Trust, anything  # noqa: E402

TRUSTED_ROOT = "trusted-root"  # beside the metadata; its name is none of a role's


def http(base: str) -> Fetcher:
    def fetch(name: str, maximum: int, offset: int = 0, /) -> Iterator[bytes]:
        del offset  # the suite's server knows no ranges, and its files come in one piece
        with urlopen(f"{base.rstrip('/')}/{name}", timeout=10) as answer:
            while block := answer.read1(16 * 1024):
                yield block

    return fetch


def trust(arguments: argparse.Namespace) -> Trust:
    folder = Path(arguments.metadata_dir)

    def clock() -> datetime:
        return datetime.now(UTC) + timedelta(days=arguments.days_in_future)

    return Trust(folder, (folder / TRUSTED_ROOT).read_bytes(), http(arguments.metadata_url), clock=clock)


def initialise(arguments: argparse.Namespace) -> None:
    folder = Path(arguments.metadata_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (TRUSTED_ROOT, "root.json"):
        shutil.copyfile(arguments.trusted_root, folder / name)


def download(arguments: argparse.Namespace) -> None:
    """Through the installer, with a home for each target; its file is what the suite then reads."""
    path = arguments.target_name
    found = trust(arguments).refresh().target(path)
    if found is None:
        raise FedgeError(f"{path}: no role lists it")
    folder = Path(arguments.target_dir)
    place = folder / quote(path, "")
    if (
        place.is_file()
        and place.stat().st_size == found.length
        and sha256(place.read_bytes()) == found.sha256
    ):
        return
    home = Path(arguments.metadata_dir).parent / "installed" / quote(path, "")
    shutil.rmtree(home, ignore_errors=True)
    installer = Installer(home, http(arguments.target_base_url), anything)
    name = quote(found.file, safe="/%?#:=&~+!$,;'@()*[]")
    installer.install(Artefact(name=name, version=1, length=found.length, sha256=found.sha256))
    data = installer.store.open().data
    folder.mkdir(parents=True, exist_ok=True)
    place.write_bytes(data)


def main() -> int:
    parser = argparse.ArgumentParser()
    for option in ("metadata-dir", "metadata-url", "target-name", "target-base-url", "target-dir"):
        parser.add_argument(f"--{option}", default="")
    parser.add_argument("--days-in-future", type=float, default=0)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("init").add_argument("trusted_root")
    commands.add_parser("refresh")
    commands.add_parser("download")
    arguments = parser.parse_args()
    try:
        if arguments.command == "init":
            initialise(arguments)
        elif arguments.command == "refresh":
            trust(arguments).refresh()
        else:
            download(arguments)
    except FedgeError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
