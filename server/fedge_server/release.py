"""From a run's variants to a signed, published release whose lineage leads back to the updates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from fedge.files import sha256
from fedge.manifest import Lineage, Release, VariantEntry
from fedge.spec import Spec
from fedge_server.compression import TierOutcome, Variant
from fedge_server.registry.database import Registry
from fedge_server.registry.publish import load_or_create_key, publish, published
from fedge_server.rounds.loop import Learned

PUBLISHED, KEYS = "release", "keys"  # folders of a home: what devices may read, and what nobody else may


@dataclass(frozen=True, slots=True)
class _Ready:
    """A variant and its gate report as bytes."""

    variant: Variant
    report: bytes

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
            evidence={
                "accuracy": gate.accuracy,
                "drop": gate.drop,
                "drop_upper": gate.drop_upper,
                "max_drop": gate.max_drop,
                "confidence": gate.confidence,
                "examples": gate.n,
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
) -> Release | None:
    """Sign and publish the variants that passed their gate; None when no tier has one.

    Tiers that the newest release serves from the same global model, and that are not in `outcomes`, stay
    in the new one.

    Args:
        home: the published folder is made in it, and the signing key kept, under `keys/`, mode 0600.
        registry: where the release is written down.
        run_id: of the run that learned the model.
        learned: the run's result; its last round is the release's lineage.
        task: name of the task.
        spec: raw input and labels of every variant.
        outcomes: of the compression, one per tier.
    """
    ready = [
        _Ready(o.variant, json.dumps(o.variant.gate.to_json(), sort_keys=True).encode())
        for o in outcomes
        if o.variant is not None
    ]
    if not ready:
        return None
    counted = next(record for record in reversed(learned.records) if record.counted)
    lineage = Lineage(run_id, counted.round, learned.model_sha256, counted.updates)
    entries = (*_kept(home / PUBLISHED, lineage, outcomes), *(item.entry() for item in ready))

    def draft(version: int) -> Release:
        created = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        return Release(
            version=version, task=task, created=created, spec=spec, lineage=lineage, variants=entries
        )

    objects = [data for item in ready for data in (item.variant.wire, item.report)]
    release = publish(home / PUBLISHED, draft, objects, load_or_create_key(home / KEYS))
    registry.record_release(
        version=release.version,
        run_id=run_id,
        round_number=lineage.round,
        global_model=lineage.global_model,
        manifest=release.to_bytes(),
        variants=[
            {
                "tier": entry.tier,
                "recipe": entry.recipe,
                "wire": entry.wire_sha256,
                "installed": entry.installed_sha256,
                "evidence": entry.evidence_sha256,
            }
            for entry in entries
        ],
    )
    return release


def _kept(folder: Path, lineage: Lineage, outcomes: Sequence[TierOutcome]) -> list[VariantEntry]:
    """Entries of the newest release for other tiers of the same global model."""
    releases = published(folder) if folder.exists() else []
    if not releases or releases[-1].lineage.global_model != lineage.global_model:
        return []
    renewed = {outcome.tier for outcome in outcomes}
    return [entry for entry in releases[-1].variants if entry.tier not in renewed]
