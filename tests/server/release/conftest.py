"""A home with a run, and releases of real models whose objects are in its store."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedge import golden
from fedge.files import sha256
from fedge.inference import CompactModel
from fedge.manifest import Lineage, Release
from fedge.routing import Routing
from fedge_server.registry.database import Registry
from fedge_server.release import ReleasePlace

sys.path.insert(0, str(Path(__file__).parents[1] / "repository"))  # places.py

REPORT = {
    "passed": True,
    "reasons": [],
    "drop_upper": 0.008,
    "max_drop": 0.01,
    "max_class_drop": None,
    "n": 300,
}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def database(request: pytest.FixtureRequest) -> str | None:
    """The URL of the registry's database; a test may ask for PostgreSQL by an indirect parameter."""
    return (
        request.getfixturevalue("postgresql_url") if getattr(request, "param", "") == "postgresql" else None
    )


@pytest.fixture
def registry(home: Path, database: str | None) -> Iterator[Registry]:
    with Registry.open(home, database) as found:
        found.begin_run("run-1", task="digits", seed=0, config={}, data="")
        yield found


@pytest.fixture
def server(home: Path, registry: Registry) -> ReleasePlace:
    """A server's home with a repository that has no tiers yet."""
    (home / "server.toml").write_text("")
    place = ReleasePlace.of(home)
    place.make()
    return place


@pytest.fixture
def drafted(registry: Registry, tools: Any) -> Callable[..., str]:
    """Keep a draft for tiers; `answer` is the label that the variant always gives."""

    def make(*tiers: str, answer: int = 0, report: dict[str, Any] = REPORT, **changes: Any) -> str:
        data = json.dumps(report, sort_keys=True).encode()
        model = tools.constant_model(answer)
        answers = CompactModel(model, tools.images).run_each(golden.inputs_of(tools.images, 1))
        gold = golden.write(tools.images, 1, answers)
        entries = []
        for tier in tiers:
            entry, wire = tools.entry_of(
                tier,
                model,
                evidence_sha256=sha256(data),
                golden_sha256=sha256(gold),
                evidence={"routing": Routing(reason="9 examples are few", shares={0.1: 0.5}).to_json()},
            )
            entries.append(entry)
            for each in (wire, data, gold):
                registry.store.put(each)
        values: dict[str, Any] = {
            "version": 1, "task": "digits", "created": "2026-01-31T12:00:00Z", "spec": tools.images,
            "lineage": Lineage("run-1", 7, registry.store.put(b"a model"), "b" * 64),
            "variants": tuple(entries),
        }  # fmt: skip
        return registry.drafts.add(Release(**{**values, **changes}))

    return make
