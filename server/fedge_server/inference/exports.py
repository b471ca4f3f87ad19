"""Global models as ONNX files, so that what answers needs neither torch nor the task's own code.

A folder holds `MODEL.ONNX.onnx` for each global model, both SHA-256: of the model's file, by which a release
names it, and of the export, by which a damaged file is told.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fedge.errors import AbsentError, DigestError
from fedge.files import read_bounded, sha256, write_atomically
from fedge.manifest import Release
from fedge_server.inference.models import Loaded, Loader

MAX_EXPORT_BYTES = 2 * 1024**3 - 1  # protobuf's own limit

ReadRelease = Callable[[int], Release]
"""The manifest of a release; raises AbsentError where there is none."""


class Exports:
    """The folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, model: str, onnx: bytes) -> None:
        """Keep the export of a global model; an earlier one of the same model goes."""
        written = self.folder / f"{model}.{sha256(onnx)}.onnx"
        write_atomically(written, onnx)
        for path in self.folder.glob(f"{model}.*.onnx"):
            if path != written:
                path.unlink(missing_ok=True)

    def has(self, model: str) -> bool:
        """Whether there is an export of a global model."""
        return any(self.folder.glob(f"{model}.*.onnx"))

    def get(self, model: str) -> bytes:
        """The export of a global model.

        Raises:
            AbsentError: there is none.
            DigestError: the disk has damaged it.
        """
        found = sorted(self.folder.glob(f"{model}.*.onnx"))
        if not found:
            raise AbsentError(f"model {model[:8]}: was not exported for inference, or is not kept any more")
        data = read_bounded(found[-1], MAX_EXPORT_BYTES)
        if found[-1].name.split(".")[1] != sha256(data):
            raise DigestError(f"{found[-1].name}: is damaged; export the model again")
        return data


def loader(exports: Exports, release: ReadRelease, *, threads: int = 1) -> Loader:
    """Opens releases whose global model was exported, with onnxruntime."""

    def load(version: int) -> Loaded:
        from fedge.inference import CompactModel  # a hub that is never asked has no use for onnxruntime

        found = release(version)
        onnx = exports.get(found.lineage.global_model)
        model = CompactModel(onnx, found.spec, threads=threads)
        return Loaded(
            version,
            found.lineage.global_model,
            found.task,
            found.spec,
            frozenset(entry.tier for entry in found.variants),
            lambda x: model.run(x)[1],
            len(onnx),
        )

    return load
