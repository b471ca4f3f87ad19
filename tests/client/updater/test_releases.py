"""From a tier's metadata to a model that answers, and every way in which its parts may disagree."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tuf_repository import NOW, Repository

from fedge.delivery import ReleaseNote, TierMark, lineage_digest
from fedge.errors import DigestError, DowngradeError, FormatError, TrustError
from fedge.files import sha256
from fedge.inference import CompactModel
from fedge.manifest import Release
from fedge_client.updater import Installer, Trust, Trusted, mark_of, model_check, offer, unpacked


@dataclass
class Publisher:
    """A repository in the layout of fedge, for tiers micro and nano."""

    repository: Repository
    tools: Any

    def publish(
        self, version: int, floor: int = 0, newest: int | None = None, tier: str = "micro"
    ) -> Release:
        entry, wire = self.tools.entry_of(tier, self.tools.constant_model(version % 3))
        release: Release = self.tools.release_of(version, (entry,))
        trial = self.tools.golden_bytes(self.tools.constant_model(version % 3))
        self.list(tier, version, release.to_bytes(), wire, lineage_digest(release.lineage), trial)
        self.mark(TierMark(tier, floor, version if newest is None else newest))
        return release

    def list(
        self,
        tier: str,
        version: int,
        manifest: bytes,
        wire: bytes,
        lineage: str = "0" * 64,
        trial: bytes = b"",
    ) -> None:
        note = ReleaseNote(version, sha256(manifest), lineage).to_json()
        self.repository.add(f"tier-{tier}", f"{tier}/{version}.manifest", manifest, note)
        self.repository.add(f"tier-{tier}", f"{tier}/{version}.model", wire, note)
        self.repository.add(f"tier-{tier}", f"{tier}/{version}.golden", trial, note)
        self.sign(tier)

    def mark(self, mark: TierMark, role: str | None = None) -> None:
        name = role or mark.tier
        self.repository.add(f"tier-{name}", f"{name}/tier.json", mark.to_bytes(), mark.to_json())
        self.sign(name)

    def sign(self, tier: str) -> None:
        self.repository.publish_targets(f"tier-{tier}")
        self.repository.publish()

    def poll(self, folder: Path, now: datetime = NOW) -> Trusted:
        repository = self.repository
        return Trust(folder, repository.trusted_root, repository.fetch, clock=lambda: now).refresh()


@pytest.fixture
def publisher(tools: Any) -> Publisher:
    repository = Repository()
    for tier in ("micro", "nano"):
        repository.delegate("targets", f"tier-{tier}", f"{tier}/*")
    repository.publish_targets()
    repository.publish()
    return Publisher(repository, tools)


def test_a_device_installs_the_newest_of_its_tier_and_opens_it_with_its_manifest(
    publisher: Publisher, tmp_path: Path
) -> None:
    for version in (1, 2):
        release = publisher.publish(version, floor=1)
    offered = offer(publisher.poll(tmp_path / "metadata"), publisher.repository.fetch, "micro")
    assert offered is not None
    assert offered.release == release
    check = model_check(offered.release.spec)
    installer = Installer(tmp_path / "home", publisher.repository.fetch, check, expand=unpacked)
    assert installer.install(offered.artefact).floor == 1
    opened = Installer(tmp_path / "home", publisher.repository.fetch, check).store.open()
    spec = Release.from_bytes(opened.notes).spec
    labels, _ = CompactModel(opened.data, spec).run(np.zeros((1, 8, 8), np.uint8))
    assert (opened.record.version, labels) == (2, ["two"])


def test_a_device_takes_the_version_it_was_told_to_but_none_below_the_floor(
    publisher: Publisher, tmp_path: Path
) -> None:
    for version in (1, 2, 3):
        publisher.publish(version, floor=2 if version == 3 else 0)
    trusted, fetch = publisher.poll(tmp_path), publisher.repository.fetch
    told = offer(trusted, fetch, "micro", 2)
    assert told is not None
    assert told.artefact.version == 2
    with pytest.raises(DowngradeError, match="below the floor 2 of tier 'micro'"):
        offer(trusted, fetch, "micro", 1)
    with pytest.raises(TrustError, match="does not list it"):
        offer(trusted, fetch, "micro", 9)


def test_a_tier_without_a_version_offers_nothing_and_an_unknown_one_is_refused(
    publisher: Publisher, tmp_path: Path
) -> None:
    publisher.mark(TierMark("micro", 0, 0))
    trusted = publisher.poll(tmp_path)
    assert offer(trusted, publisher.repository.fetch, "micro") is None
    for tier in ("nano", "other"):
        with pytest.raises(TrustError, match="metadata says nothing of it"):
            mark_of(trusted, tier)


def test_a_mark_of_another_tier_or_with_a_floor_above_its_newest_is_refused(
    publisher: Publisher, tmp_path: Path
) -> None:
    for mark in (TierMark("nano", 0, 3), TierMark("micro", 4, 3)):
        publisher.mark(mark, "micro")
        with pytest.raises(FormatError, match=r"micro/tier\.json: speaks of"):
            mark_of(publisher.poll(tmp_path), "micro")


def test_another_tiers_artefact_is_refused_though_its_own_key_signs_it(
    publisher: Publisher, tmp_path: Path
) -> None:
    release = publisher.publish(3, tier="nano")
    wire = publisher.repository.fetch(offer_file(publisher, "nano", 3), 10**6)
    publisher.list("micro", 3, release.to_bytes(), b"".join(wire))
    publisher.mark(TierMark("micro", 0, 3))
    with pytest.raises(TrustError, match="no variant for tier 'micro'"):
        offer(publisher.poll(tmp_path), publisher.repository.fetch, "micro")


def offer_file(publisher: Publisher, tier: str, version: int) -> str:
    (name,) = [
        name for name in publisher.repository.files if name.endswith(f".{version}.model") and tier in name
    ]
    return name


def test_manifest_and_model_must_belong_together(publisher: Publisher, tmp_path: Path) -> None:
    publisher.publish(1)
    second = publisher.publish(2)
    fetch = publisher.repository.fetch
    targets = publisher.repository.targets["tier-micro"].targets
    good = targets["micro/2.model"]

    targets["micro/2.model"] = targets["micro/1.model"]  # under the name of the other
    publisher.sign("micro")
    with pytest.raises(FormatError, match="says version 1"):
        offer(publisher.poll(tmp_path), fetch, "micro")

    publisher.list("micro", 2, second.to_bytes(), b"other bytes")
    with pytest.raises(DigestError, match="speaks of another variant"):
        offer(publisher.poll(tmp_path), fetch, "micro")

    good.unrecognized_fields["custom"]["manifest"] = "1" * 64
    targets["micro/2.model"] = good
    publisher.sign("micro")
    with pytest.raises(DigestError, match="belongs to another manifest"):
        offer(publisher.poll(tmp_path), fetch, "micro")

    entry, wire = publisher.tools.entry_of("micro", publisher.tools.constant_model(2))
    old = replace(second, version=1)
    publisher.list("micro", 2, old.to_bytes(), wire)
    with pytest.raises(DigestError, match="another variant"):
        offer(publisher.poll(tmp_path), fetch, "micro")

    publisher.list("micro", 2, second.to_bytes(), wire, trial=b"of another model")
    with pytest.raises(DigestError, match="another trial"):
        offer(publisher.poll(tmp_path), fetch, "micro")

    for kind in ("manifest", "model", "golden"):
        targets[f"micro/2.{kind}"].unrecognized_fields["custom"]["manifest"] = "1" * 64
    publisher.sign("micro")
    with pytest.raises(DigestError, match="another manifest than its metadata says"):
        offer(publisher.poll(tmp_path), fetch, "micro")

    named = publisher.tools.release_of(2, (replace(entry, reference_sha256=sha256(b"one")),))
    trial = publisher.tools.golden_bytes(publisher.tools.constant_model(2))
    publisher.list("micro", 2, named.to_bytes(), wire, trial=trial)
    note = targets["micro/2.model"].unrecognized_fields["custom"]
    publisher.repository.add("tier-micro", "micro/2.reference", b"two", note)
    publisher.sign("micro")
    with pytest.raises(DigestError, match="another reference"):
        offer(publisher.poll(tmp_path), fetch, "micro")


def test_a_manifest_that_was_changed_on_its_way_is_refused(publisher: Publisher, tmp_path: Path) -> None:
    publisher.publish(1)
    files = publisher.repository.files
    (name,) = [name for name in files if name.endswith(".manifest")]
    files[name] = files[name].replace(b'"version":1', b'"version":2')
    with pytest.raises(DigestError, match="not those that were signed"):
        offer(publisher.poll(tmp_path), publisher.repository.fetch, "micro")
