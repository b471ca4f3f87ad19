"""From a run's variants to a draft of a release, whose lineage leads back to the updates; and published.

A release holds the variants of one compression and no others. Each tier has a role and a list of releases of
its own, so what other tiers run is neither signed again nor installed again.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy.typing as npt

from fedge import golden
from fedge.artefact import unpack
from fedge.config import Tier
from fedge.errors import CompressionError, FedgeError, UserError
from fedge.files import sha256
from fedge.inference import CompactModel
from fedge.manifest import Lineage, Release, VariantEntry
from fedge.routing import KEY
from fedge.spec import Spec
from fedge_server.compression import TierOutcome, Variant
from fedge_server.hub.home import Home
from fedge_server.inference.exporting import export_model
from fedge_server.inference.exports import Exports
from fedge_server.registry.database import Registry
from fedge_server.registry.drafts import VERSION
from fedge_server.release.place import ReleasePlace
from fedge_server.release.publishing import Published, postpone, publish_draft
from fedge_server.release.references import reference_of
from fedge_server.rounds.loop import Learned

log = logging.getLogger("fedge.inference")


@dataclass(frozen=True, slots=True)
class _Ready:
    """A variant with its gate report, golden inputs and telemetry reference as bytes."""

    variant: Variant
    report: bytes
    golden: bytes
    reference: bytes  # of telemetry; empty: there is none

    @property
    def objects(self) -> list[bytes]:
        """What the manifest names."""
        return [data for data in (self.variant.wire, self.report, self.golden, self.reference) if data]

    def entry(self) -> VariantEntry:
        variant, gate = self.variant, self.variant.gate
        return VariantEntry(
            tier=variant.tier,
            recipe=variant.recipe,
            wire_sha256=sha256(variant.wire),
            wire_bytes=len(variant.wire),
            installed_sha256=sha256(variant.installed),
            installed_bytes=len(variant.installed),
            evidence_sha256=sha256(self.report),
            golden_sha256=sha256(self.golden),
            reference_sha256=sha256(self.reference) if self.reference else "",
            evidence={
                "accuracy": gate.accuracy,
                "drop": gate.drop,
                "drop_upper": gate.drop_upper,
                "max_drop": gate.max_drop,
                "confidence": gate.confidence,
                "examples": gate.n,
                KEY: variant.routing.to_json(),
            },
        )


def publish_outcomes(
    home: Path,
    registry: Registry,
    run_id: str,
    learned: Learned,
    task: str,
    spec: Spec,
    outcomes: Sequence[TierOutcome],
    tiers: Mapping[str, Tier],
    *,
    examples: npt.NDArray[Any] | None = None,
) -> Published | None:
    """Keep a draft of the variants that passed their gate, and publish it as far as it can be signed.

    Args:
        home: of the repository and the keys.
        registry: where draft and release are written down.
        run_id: of the run that learned the model.
        learned: the run's result; its last round is the release's lineage.
        task: name of the task.
        spec: raw input and labels of every variant.
        outcomes: of the compression, one per tier.
        tiers: their budgets, by name.
        examples: (N, *spec.shape) raw, to make telemetry references of; None: releases have none.

    Returns:
        None when no tier has a variant.

    Raises:
        UserError: the run's model is not kept any more.
        FedgeError: it cannot be published in a folder of a simulation; on a server the draft waits.
    """
    counted = next(record for record in reversed(learned.records) if record.counted)
    lineage = Lineage(run_id, counted.round, learned.model_sha256, counted.updates)
    made = [outcome.variant for outcome in outcomes if outcome.variant is not None]
    if not made:
        return None
    ready = [_ready(variant, spec, lineage, tiers[variant.tier], examples) for variant in made]
    draft = Release(
        version=VERSION,
        task=task,
        created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        spec=spec,
        lineage=lineage,
        variants=tuple(item.entry() for item in ready),
    )
    place = ReleasePlace.of(home)
    with registry.store.adding():  # until the draft names them
        if (why := registry.why_gone(run_id)) is not None:
            raise UserError(f"run {run_id}: {why}")  # it was over, and retired while this compressed
        for item in ready:
            for data in item.objects:
                registry.store.put(data)
        if place.is_server and place.inference.enabled:
            _export(home, learned, spec)
        name = registry.drafts.untouched(draft) or registry.drafts.add(draft)
    try:
        return publish_draft(place, registry, name)
    except FedgeError as error:
        if not place.is_server:
            raise
        return postpone(registry, name, str(error))  # the run is whole: a person can publish it later


def _export(home: Path, learned: Learned, spec: Spec) -> None:
    """So that the global model can answer devices from when the release is out."""
    try:
        export_model(Exports(Home(home).exports), learned.model_sha256, learned.model, spec)
    except CompressionError as error:
        log.warning(
            "devices that ask the cloud will not be answered, its model cannot be exported: %s", error
        )


def _ready(
    variant: Variant, spec: Spec, lineage: Lineage, tier: Tier, examples: npt.NDArray[Any] | None
) -> _Ready:
    report = json.dumps(variant.gate.to_json(), sort_keys=True).encode()
    budget = math.inf if tier.max_latency_ms is None else tier.max_latency_ms / 1000
    seed = int(lineage.global_model[:16], 16)
    model = CompactModel(unpack(variant.wire, len(variant.installed)), spec)  # what ships, as devices run it
    answers = model.run_each(golden.inputs_of(spec, seed))
    reference = b"" if examples is None else reference_of(model, examples)
    return _Ready(variant, report, golden.write(spec, seed, answers, latency_s=budget), reference)
