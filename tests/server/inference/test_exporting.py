"""From a run's release to a global model that answers: the same as torch, found by version and tier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedge.config import Config
from fedge.errors import AbsentError
from fedge.task import resolve
from fedge_server.inference.exporting import export_model
from fedge_server.inference.exports import Exports, loader
from fedge_server.inference.released import newest, reader
from fedge_server.registry.database import Registry
from fedge_server.rounds.starting import whole_model
from fedge_simulations import run

CONFIG: dict[str, Any] = {
    "task": "digits",
    "model": {"name": "logistic"},
    "clients": {"count": 2},
    "rounds": {"count": 2},
    "train": {"epochs": 1},
    "compress": {"students": [], "forms": ["fp32"], "prune": {"kinds": []}},
    "tiers": {"micro": {"max_drop": 0.5}},
}


@pytest.mark.slow
def test_the_global_model_of_a_release_answers_as_it_does_in_torch(tmp_path: Path) -> None:
    config = Config.from_mapping(CONFIG)
    run(config, tmp_path / "run")
    with Registry.open(tmp_path / "run") as registry:
        version = newest(registry)("micro")
        release = reader(registry)(version)
        exports = Exports(tmp_path / "exports")
        load = loader(exports, reader(registry))
        with pytest.raises(AbsentError, match="was not exported"):
            load(version)
        path = registry.store.path(release.lineage.global_model)
        model, digest = whole_model(str(path), config, resolve("digits"), release.spec, registry)
        export_model(exports, digest, model, release.spec)
        loaded = load(version)
        assert (loaded.version, loaded.model, loaded.tiers) == (1, digest, {"micro"})
        x = np.random.default_rng(0).integers(0, 17, (5, *release.spec.shape)).astype(release.spec.dtype)
        with torch.inference_mode():
            wanted = torch.softmax(model.eval()(torch.from_numpy(x)), 1).numpy()
        assert loaded.run(x) == pytest.approx(wanted, abs=1e-4)
        written = [path.stat().st_mtime_ns for path in exports.folder.iterdir()]
        export_model(exports, digest, model, release.spec)  # is there already
        assert [path.stat().st_mtime_ns for path in exports.folder.iterdir()] == written
        with pytest.raises(AbsentError, match="no release 9"):
            reader(registry)(9)
        with pytest.raises(AbsentError, match="tier 'macro'"):
            newest(registry)("macro")
