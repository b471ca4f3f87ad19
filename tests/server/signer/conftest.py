"""The places of the repository's tests, and signers in this process and in others."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "repository"))  # places.py

from places import Place


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A repository with tiers micro and board."""
    return Place(tmp_path / "repository").make()
