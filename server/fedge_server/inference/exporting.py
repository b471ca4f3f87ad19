"""Makes the exports that the Inference service answers with: the one part of it that needs torch."""

from __future__ import annotations

import copy

from fedge.learning.whole import WholeModel
from fedge.spec import Spec
from fedge_server.compression.export import export
from fedge_server.inference.exports import Exports


def export_model(exports: Exports, digest: str, model: WholeModel, spec: Spec) -> None:
    """Export a global model, unless that was done already.

    Args:
        exports: where it goes.
        digest: SHA-256 of the model's file, by which releases name it.
        model: it is not changed.
        spec: of its input and labels.

    Raises:
        CompressionError: it cannot be exported faithfully.
    """
    if not exports.has(digest):
        exports.put(digest, export(copy.deepcopy(model).eval(), spec))
