from __future__ import annotations

import copy
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from places import Client, Place


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("repository") / "made").make()


@pytest.fixture
def place(made: Place, tmp_path: Path) -> Place:
    """A repository of its own with the tiers micro and board, and no release."""
    shutil.copytree(made.path, tmp_path / "repository")
    keys = {role: list(held) for role, held in made.keys.items()}
    return Place(tmp_path / "repository", copy.deepcopy(made.clock), {}, keys, made.first_root)


@pytest.fixture
def client(place: Place, tmp_path: Path) -> Client:
    return Client(tmp_path / "device", place)
