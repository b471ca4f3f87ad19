"""From what compression gives to a draft: golden inputs of what ships, and a run that is never lost."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fedge import golden
from fedge.artefact import unpack
from fedge.config import Tier
from fedge.dataset import Examples
from fedge.errors import FedgeError, UserError
from fedge.golden import Golden
from fedge.inference import CompactModel
from fedge.learning.whole import WholeModel
from fedge.routing import KEY, Routing, Rule
from fedge_server.data import ServerData
from fedge_server.inference.exports import Exports
from fedge_server.inference.released import reader
from fedge_server.registry import schema
from fedge_server.registry.dump import copy_database
from fedge_server.registry.engine import writing
from fedge_server.release import ReleasePlace, publish_draft
from fedge_server.release.lineage import last_variants
from fedge_server.release.outcomes import publish_outcomes
from fedge_server.release.references import examples_of
from fedge_server.telemetry.references import references

TIERS = {"micro": Tier(max_latency_ms=250.0), "board": Tier()}


class Rows(torch.nn.Module):
    """Images as rows of numbers."""

    def forward(self, raw: torch.Tensor) -> torch.Tensor:
        return raw.float().flatten(1)


LEARNED = SimpleNamespace(
    records=[
        SimpleNamespace(counted=True, round=3, updates="b" * 64),
        SimpleNamespace(counted=False, round=4, updates=""),
    ],
    model_sha256="0f" * 32,
    model=WholeModel(Rows(), torch.nn.Linear(64, 3)),
)


ROUTING = Routing("margin", Rule("margin", 0.25), "", "at most 0.5 %", 0.005, 0.95, 0.0, 0.1, 900, {0.1: 0.5})


class Gate(SimpleNamespace):
    def to_json(self) -> dict[str, Any]:
        return vars(self) | {"reasons": [], "max_class_drop": None}


def outcome(tools: Any, tier: str, answer: int = 1) -> Any:
    model = tools.linear_model(
        tools.images, np.random.default_rng(answer).normal(size=(64, 3)) / 99, np.zeros(3)
    )
    gate = Gate(passed=True, accuracy=0.9, drop=0.0, drop_upper=0.01, max_drop=0.02, confidence=0.95, n=300)
    _, wire = tools.entry_of(tier, model)
    return SimpleNamespace(
        tier=tier,
        variant=SimpleNamespace(
            tier=tier, recipe="int8", wire=wire, installed=model, gate=gate, routing=ROUTING
        ),
    )


@pytest.fixture
def publish(home, registry, tools):
    def go(*outcomes: Any, **further: Any) -> Any:
        return publish_outcomes(
            home, registry, "run-1", LEARNED, "digits", tools.images, outcomes, TIERS, **further
        )  # type: ignore[arg-type]  # stand-ins with what is read of them

    return go


def test_golden_answers_are_those_of_the_decoded_shipping_bytes_one_at_a_time(publish, home, registry, tools):
    made = outcome(tools, "micro")
    done = publish(made, outcome(tools, "board"), SimpleNamespace(tier="gateway", variant=None))
    assert [entry.tier for entry in done.release.variants] == ["micro", "board"]
    assert Routing.from_json(done.release.variant("micro").evidence[KEY]) == ROUTING  # signed with it
    assert (done.release.lineage.round, done.release.lineage.updates) == (3, "b" * 64)
    entry = done.release.variant("micro")
    found = Golden.from_bytes(registry.store.get(entry.golden_sha256), tools.images)
    model = CompactModel(unpack(made.variant.wire, entry.installed_bytes), tools.images)
    assert found.x.tobytes() == golden.inputs_of(tools.images, 0x0F0F0F0F0F0F0F0F).tobytes()
    assert np.abs(found.probabilities - model.run_each(found.x)).max() < 1e-5
    assert found.latency_s == 0.25
    assert len({tuple(row) for row in found.probabilities.round(3).tolist()}) > 3  # they tell models apart
    offered = ReleasePlace.of(home).repository.content("micro").releases[1].files["golden"]
    assert offered.sha256 == entry.golden_sha256


def test_each_variant_has_a_reference_of_its_own_answers_which_the_store_of_telemetry_finds(
    publish, home, registry, tools
):
    def part(count: int, seed: int) -> Any:
        draw = np.random.default_rng(seed)
        return Examples(draw.integers(0, 255, (count, 8, 8)).astype(np.uint8), draw.integers(0, 3, count))

    few = ServerData(tools.images, part(60, 0), part(20, 1), part(10, 2))
    assert examples_of(few) is None
    data = ServerData(tools.images, part(500, 0), part(90, 1), part(30, 2))
    x = examples_of(data)
    assert len(x) == 120  # of what trained nothing
    assert len(examples_of(replace(data, gate=part(5, 2)))) == 595  # that alone would be too little
    done = publish(outcome(tools, "micro"), outcome(tools, "board", answer=2), examples=x)
    find = references(registry, reader(registry))
    for tier in ("micro", "board"):
        entry = done.release.variant(tier)
        model = CompactModel(
            unpack(registry.store.get(entry.wire_sha256), entry.installed_bytes), tools.images
        )
        found = find(tier, 1)
        assert found.digest == entry.reference_sha256
        assert found.answers.tolist() == np.bincount(model.run_each(x).argmax(1), minlength=3).tolist()
        assert found.inputs.sum(1).tolist() == [120] * len(found.names)
        offered = ReleasePlace.of(home).repository.content(tier).releases[1].files["reference"]
        assert offered.sha256 == entry.reference_sha256
    assert find("micro", 2) is find("gateway", 1) is None
    needed: list[str] = []
    (home / "copy").mkdir()
    copy_database(registry.engine, home / "copy", needed.extend)
    assert done.release.variant("micro").reference_sha256 in needed  # a backup holds it


def test_the_last_variant_of_a_tier_is_that_of_its_newest_release(publish, registry, tools):
    first, second = outcome(tools, "micro", 1), outcome(tools, "board", 2)
    publish(first, second)
    assert last_variants(registry, ["board"], besides="") == {"board": second.variant.installed}
    third = outcome(tools, "micro", 3)
    publish(third)
    wanted = {"micro": third.variant.installed, "board": second.variant.installed}
    assert last_variants(registry, ["micro", "board", "new"], besides="") == wanted
    assert last_variants(registry, ["micro"], besides=LEARNED.model_sha256) == {}


def test_variants_of_a_run_whose_model_was_removed_meanwhile_are_not_drafted(publish, registry, tools):
    with writing(registry.engine) as connection:
        connection.execute(schema.runs.update().values(retired=0.0))
    with pytest.raises(UserError, match="its model and state were removed on 1970-01-01"):
        publish(outcome(tools, "micro"))
    assert registry.drafts.all() == []


def test_nothing_can_be_removed_from_the_first_object_of_a_publication_until_its_row(
    server, publish, registry, tools, monkeypatch
):
    server.make(["micro"])
    real, put = registry.store.put, []

    def watched(data: bytes) -> str:
        with pytest.raises(BlockingIOError), registry.store.removing():
            raise AssertionError("whoever removes would take it for rubbish")
        put.append(data)
        return real(data)

    monkeypatch.setattr(registry.store, "put", watched)
    assert publish(outcome(tools, "micro")).release.version == 1
    assert len(put) == 5  # wire, report, golden inputs, and the manifests of draft and release
    with registry.store.removing():
        pass


def test_without_a_variant_there_is_no_draft(publish, registry):
    assert publish(SimpleNamespace(tier="micro", variant=None)) is None
    assert registry.drafts.all() == []


@pytest.mark.slow
def test_a_run_that_is_asked_again_goes_on_with_the_draft_it_has(server, publish, registry, tools):
    first, again = (publish(outcome(tools, "micro")) for _ in range(2))
    assert first.draft == again.draft
    exported = CompactModel(Exports(server.home / "exports").get(LEARNED.model_sha256), tools.images)
    assert exported.run(tools.images.zeros(2))[1].shape == (2, 3)  # it can answer devices that ask
    assert len(registry.drafts.all()) == 1
    server.make(["micro"])
    assert publish(outcome(tools, "micro")).release.version == 1
    assert publish(outcome(tools, "micro", answer=2)).release.version == 2


@pytest.mark.slow
def test_a_repository_that_fails_leaves_the_run_whole_and_its_draft_waiting(server, publish, registry, tools):
    server.make(["micro"])
    damaged = server.home / "repository/metadata/timestamp.json"
    whole = damaged.read_bytes()
    damaged.write_text("{}")
    done = publish(outcome(tools, "micro"))
    assert done.release is None
    assert "timestamp.json: no TUF metadata" in done.waiting[0].why
    damaged.write_bytes(whole)
    assert publish_draft(server, registry, done.draft).release.version == 1


def test_in_a_simulation_it_is_an_error(publish, home, tools):
    publish(outcome(tools, "micro"))
    (home / "repository/metadata/timestamp.json").write_text("{}")
    with pytest.raises(FedgeError, match="no TUF metadata"):
        publish(outcome(tools, "micro", answer=2))
