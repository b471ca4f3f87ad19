"""Real tiny models and a real publisher, shared by the tests of both sides."""

from __future__ import annotations

import gc
import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

# Before gRPC is imported: some tests fork a child to kill it. It makes no call, and gRPC's handlers around a
# fork may leave the parent's own connections standing still.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

from tuf_repository import Repository

from fedge import golden
from fedge.artefact import pack
from fedge.delivery import ReleaseNote, TierMark, lineage_digest, mark_path
from fedge.errors import FormatError
from fedge.files import sha256
from fedge.manifest import Lineage, Release, VariantEntry
from fedge.spec import Spec

if TYPE_CHECKING:
    import numpy.typing as npt

gc.disable()  # until all modules are loaded: see pytest_collection_finish

# A slow or busy machine must not fail a test; the same examples come every time,
# and `make test` takes more of them.
for name, examples in (("quick", 20), ("thorough", 60)):
    settings.register_profile(
        name,
        deadline=None,
        derandomize=True,
        max_examples=examples,
        suppress_health_check=[HealthCheck.too_slow],
    )
settings.load_profile("quick")


def pytest_collection_finish() -> None:
    """Leave what is there now, which are libraries for the most part, out of garbage collection."""
    gc.freeze()
    gc.enable()


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark the cases of a parametrised test slow that are not among its quick ones."""
    quick = item.get_closest_marker("quick_where")
    if quick is not None:
        given = item.callspec.params  # type: ignore[attr-defined]
        if any(given[name] not in values for name, values in quick.kwargs.items()):
            item.add_marker("slow")


@pytest.fixture(scope="session", autouse=True)
def unsynced() -> Iterator[None]:
    """Writes of this process wait for no disk: a loss of power, which alone undoes them, no test makes.

    A killed process leaves to the system what it wrote. Processes that tests start wait as ever.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)  # refuses what is no open file, as fsync does
        yield


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """A command that is run in this process sets up logging to a stream that ends with its test."""
    root, ours = logging.getLogger(), logging.getLogger("fedge")
    before, levels = root.handlers[:], (root.level, ours.level)
    yield
    for handler in [handler for handler in root.handlers if handler not in before]:
        root.removeHandler(handler)
    for logger, level in zip((root, ours), levels, strict=True):
        if logger.level != level:  # it empties the caches of all loggers
            logger.setLevel(level)


LABELS = ("zero", "one", "two")
IMAGES = Spec("image", (8, 8), "uint8", LABELS)
REPORT = b'{"gate":"passed"}'


def linear_model(
    spec: Spec, weights: npt.NDArray[Any], bias: npt.NDArray[Any], *, filler: bytes = b""
) -> bytes:
    """softmax(x @ weights + bias) as the ONNX graph of a variant; weights (F, classes), bias (classes,)."""
    from onnx import TensorProto, helper, numpy_helper

    inputs = {"uint8": TensorProto.UINT8, "float32": TensorProto.FLOAT}[spec.dtype]
    constants = {
        "weights": weights.astype(np.float32),
        "bias": bias.astype(np.float32),
        "flat": np.array([-1, weights.shape[0]], np.int64),
        "names": np.array(spec.labels, object),
    }
    nodes = [
        helper.make_node("Cast", ["input"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["numbers", "flat"], ["rows"]),
        helper.make_node("MatMul", ["rows", "weights"], ["products"]),
        helper.make_node("Add", ["products", "bias"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
        helper.make_node("ArgMax", ["probabilities"], ["best"], axis=1, keepdims=0),
        helper.make_node("Gather", ["names", "best"], ["label"]),
    ]
    graph = helper.make_graph(
        nodes,
        "variant",
        [helper.make_tensor_value_info("input", inputs, ["B", *spec.shape])],
        [
            helper.make_tensor_value_info("label", TensorProto.STRING, ["B"]),
            helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["B", spec.classes]),
        ],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
        doc_string=filler.hex(),
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    return bytes(model.SerializeToString())


@lru_cache
def constant_model(answer: int, spec: Spec = IMAGES, filler: bytes = b"") -> bytes:
    """A variant that always answers the label of this index, with probability e^4 / (e^4 + classes - 1)."""
    bias = np.zeros(spec.classes)
    bias[answer] = 4.0
    return linear_model(spec, np.zeros((int(np.prod(spec.shape)), spec.classes)), bias, filler=filler)


packed = lru_cache(pack)


GOLDEN: dict[str, bytes] = {}  # by digest: those of all entries made


REFERENCES: dict[str, bytes] = {}  # likewise


def entry_of(tier: str, model: bytes, spec: Spec = IMAGES, **changes: Any) -> tuple[VariantEntry, bytes]:
    """The manifest entry of a model, and its wire bytes."""
    wire, trial = packed(model), golden_bytes(model, spec)
    GOLDEN[sha256(trial)] = trial
    values = {
        "tier": tier,
        "recipe": "distil + int8",
        "wire_sha256": hashlib.sha256(wire).hexdigest(),
        "wire_bytes": len(wire),
        "installed_sha256": hashlib.sha256(model).hexdigest(),
        "installed_bytes": len(model),
        "evidence_sha256": hashlib.sha256(REPORT).hexdigest(),
        "golden_sha256": sha256(trial),
        "evidence": {"drop_upper": 0.008, "gate": "passed"},
    }
    return VariantEntry(**{**values, **changes}), wire


def release_of(version: int, entries: tuple[VariantEntry, ...], **changes: Any) -> Release:
    values: dict[str, Any] = {
        "version": version,
        "task": "digits",
        "created": "2026-01-31T12:00:00Z",
        "spec": IMAGES,
        "lineage": Lineage("run-1", 7, "a" * 64, "b" * 64),
        "variants": entries,
    }
    return Release(**{**values, **changes})


@lru_cache
def golden_bytes(model: bytes, spec: Spec = IMAGES) -> bytes:
    """The golden file of a model; of bytes that are none: all labels alike."""
    from fedge.inference import CompactModel

    x = golden.inputs_of(spec, 7)
    try:
        rows = CompactModel(model, spec).run_each(x)
    except FormatError:
        rows = np.full((len(x), spec.classes), 1 / spec.classes, np.float32)
    return golden.write(spec, 7, np.nan_to_num(rows))


@dataclass
class Publisher:
    """A repository's folder and its keys. `place` signs anything into it, as a careless signer would."""

    folder: Path
    repository: Repository = field(default_factory=lambda: Repository(datetime(2999, 1, 1, tzinfo=UTC)))

    def __post_init__(self) -> None:
        self.repository.delegate("targets", "tier-micro", "micro/*")
        self.repository.publish_targets()

    @property
    def root(self) -> bytes:
        return self.repository.trusted_root

    def place(self, release: Release, wires: tuple[bytes, ...], trial: bytes | None = None) -> None:
        """List a release, and for each of its variants its bytes, for those tiers that have a role."""
        manifest = release.to_bytes()
        note = ReleaseNote(release.version, sha256(manifest), lineage_digest(release.lineage)).to_json()
        for entry, wire in zip(release.variants, wires, strict=True):
            role = f"tier-{entry.tier}"
            contents = {"manifest": manifest, "model": wire, "golden": trial or GOLDEN[entry.golden_sha256]}
            if entry.reference_sha256:
                contents["reference"] = REFERENCES[entry.reference_sha256]
            if role not in self.repository.targets:
                self.repository.delegate("targets", role, f"{entry.tier}/*")
                self.repository.publish_targets()
            for kind, content in contents.items():
                self.repository.add(role, f"{entry.tier}/{release.version}.{kind}", content, note)
            self.mark(TierMark(entry.tier, 0, release.version))

    def mark(self, mark: TierMark) -> None:
        """Say what holds for a tier, and publish."""
        self.repository.add(f"tier-{mark.tier}", mark_path(mark.tier), mark.to_bytes(), mark.to_json())
        self.repository.publish_targets(f"tier-{mark.tier}")
        self.write()

    def write(self) -> None:
        """Sign what is there, and put it into the folder."""
        self.repository.publish()
        self.repository.write(self.folder / "metadata", lambda name: "/" not in name)
        self.repository.write(self.folder / "targets", lambda name: "/" in name)

    def file(self, path: str) -> Path:
        """Where a target's bytes lie."""
        tier, _, name = path.partition("/")
        digest = self.repository.targets[f"tier-{tier}"].targets[path].hashes["sha256"]
        return self.folder / "targets" / tier / f"{digest}.{name}"

    def offer(
        self, version: int, *, answer: int, tier: str = "micro", reference: bytes = b"", **changes: Any
    ) -> Release:
        """Offer a release whose variant always gives this answer."""
        spec = changes.get("spec", IMAGES)
        named = {"reference_sha256": sha256(reference)} if reference else {}
        REFERENCES.update(dict.fromkeys(named.values(), reference))
        entry, wire = entry_of(tier, constant_model(answer, spec), spec, **named)
        release = release_of(version, (entry,), **changes)
        self.place(release, (wire,))
        return release


@pytest.fixture
def publisher(tmp_path: Path) -> Publisher:
    return Publisher(tmp_path / "published")


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An SQLite file of the newest schema with nothing in it, made by the very migrations."""
    from fedge_server.registry.database import Registry

    home = tmp_path_factory.mktemp("empty")
    Registry.open(home).close()
    return (home / "fedge.db").read_bytes()


@pytest.fixture
def quick_sqlite(monkeypatch: pytest.MonkeyPatch, empty_database: bytes) -> None:
    """SQLite in this process without what takes longer than most tests: migrations, and waiting for the disk.

    New databases begin as that copy; see `unsynced` for the disk.
    """
    from fedge_server.registry import database, engine

    check: Callable[[Any, Path], None] = database.upgrade
    connected: Callable[[Any, Any], None] = engine._durable_sqlite

    def relaxed(connection: Any, record: Any) -> None:
        connected(connection, record)
        connection.execute("PRAGMA synchronous=OFF")

    def upgrade(engine: Any, home: Path) -> None:
        file = home / "fedge.db"
        if engine.dialect.name == "sqlite" and not file.exists():
            file.write_bytes(empty_database)
        check(engine, home)

    monkeypatch.setattr(engine, "_durable_sqlite", relaxed)
    monkeypatch.setattr(database, "upgrade", upgrade)


@pytest.fixture(scope="session")
def tools() -> Any:
    """The builders of this file, for tests that need other models or manifests."""

    class Tools:
        linear_model = staticmethod(linear_model)
        constant_model = staticmethod(constant_model)
        entry_of = staticmethod(entry_of)
        release_of = staticmethod(release_of)
        images = IMAGES
        labels = LABELS
        report = REPORT
        golden_bytes = staticmethod(golden_bytes)
        sha256 = staticmethod(sha256)

    return Tools
