"""A real SuperLink, certificates made by the very commands of docs/superlink.md, and shares of the digits."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from sklearn.datasets import load_digits

ROOT = Path(__file__).parents[2]


def load(path: Path) -> ModuleType:
    """A module by its path: `benchmarks` is no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def side() -> ModuleType:
    """benchmarks/_superlink.py, which starts and ends the processes."""
    return load(ROOT / "benchmarks" / "_superlink.py")


@dataclass(frozen=True, slots=True)
class Certificates:
    """What the commands of the document made: the server's files and those of two devices."""

    server: Path
    devices: tuple[Path, Path]


def commands() -> list[str]:
    """The three blocks under "Certificates and keys": at the server, on a device, and at the server again."""
    text = (ROOT / "docs" / "superlink.md").read_text("utf-8")
    section = text.partition("## Certificates and keys")[2].partition("\n## ")[0]
    return re.findall(r"^```sh\n(.*?)^```", section, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    folder = tmp_path_factory.mktemp("certificates")
    at_server, on_device, signing = commands()

    def sh(script: str, where: Path) -> None:
        subprocess.run(["sh", "-e"], input=script, text=True, cwd=where, check=True, capture_output=True)

    server, devices = folder / "server", (folder / "device-1", folder / "device-2")
    server.mkdir()
    sh(at_server, server)
    for device in devices:
        device.mkdir()
        sh(on_device, device)
        (server / "device.csr").write_bytes((device / "device.csr").read_bytes())
        sh(signing, server)
        for name in ("device.pem", "ca.pem"):
            (device / name).write_bytes((server / name).read_bytes())
    return Certificates(server, devices)


@pytest.fixture(scope="session")
def tls(side: ModuleType, certificates: Certificates):
    server = certificates.server
    keys = tuple(device / "node.key" for device in certificates.devices)
    return side.Tls(server / "ca.pem", server / "server.pem", server / "server.key", keys)


@pytest.fixture(scope="session")
def shares(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The digits in three files: two devices' and the server's."""
    folder, digits = tmp_path_factory.mktemp("shares"), load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    paths = [folder / f"{name}.npz" for name in ("north", "south", "server")]
    for path, rows in zip(paths, np.array_split(order, 3), strict=True):
        np.savez(path, x=digits.images[rows].astype(np.float32), y=digits.target[rows])
    return paths
