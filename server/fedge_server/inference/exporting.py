"""Makes the exports that the Inference service answers with: the one part of it that needs torch."""

from __future__ import annotations

from fedge.config import Config
from fedge.manifest import Release
from fedge.task import resolve
from fedge_server.compression.export import export
from fedge_server.inference.exports import Exports
from fedge_server.registry.database import Registry
from fedge_server.rounds.starting import whole_model


def export_release(exports: Exports, registry: Registry, release: Release, config: Config) -> None:
    """Export a release's global model, unless that was done already.

    Args:
        exports: where it goes.
        registry: holds the release and its model.
        release: its manifest.
        config: of its run.

    Raises:
        ConfigError: the model does not fit the configuration.
        CompressionError: it cannot be exported faithfully.
    """
    digest = release.lineage.global_model
    if exports.has(digest):
        return
    model, _ = whole_model(
        str(registry.store.path(digest)), config, resolve(config.task), release.spec, registry
    )
    exports.put(digest, export(model.eval(), release.spec))
