"""A device with a model installed, its processes, and what programs ask them: for `runtime.py`."""

from __future__ import annotations

import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from fedge.files import sha256
from fedge.inference import CompactModel
from fedge.learning.whole import WholeModel
from fedge.manifest import Lineage, Release, VariantEntry
from fedge.spec import Spec
from fedge.task import resolve
from fedge_client.device import Device
from fedge_client.runtime import Runtime
from fedge_client.updater.store import ARTEFACT, NOTES, Record, State
from fedge_server.compression.export import export

SPEC = Spec("image", (28, 28), "uint8", tuple(map(str, range(10))))
ARCHITECTURE = ("cnn3", 12)  # of the smallest variant that the search for Fashion-MNIST chose


def student() -> bytes:
    """The variant's network with weights as they are drawn: they do not matter for speed and memory."""
    torch.manual_seed(0)
    task, (family, width) = resolve("images"), ARCHITECTURE
    model = WholeModel(task.preprocess(SPEC, None, "none"), task.families[family].of(width)(SPEC))
    return export(model.eval(), SPEC)


def release_of(model: bytes, version: int = 1) -> Release:
    """A manifest that names this model."""
    digest = sha256(model)
    entry = VariantEntry("micro", "benchmark", digest, len(model), digest, len(model), digest, digest)
    lineage = Lineage("benchmark", 1, "a" * 64, "b" * 64)
    created = "2026-01-01T00:00:00Z"
    return Release(
        version=version, task="images", created=created, spec=SPEC, lineage=lineage, variants=(entry,)
    )


def install(home: Path, model: bytes, version: int = 1) -> None:
    """Put a model where the installer would; what it is trusted by is measured elsewhere."""
    root = json.dumps({"signed": {"_type": "root", "version": 1}}).encode()
    device = Device.create(home, "micro", root)
    store = device.store
    state: State = store.state()
    notes = release_of(model, version).to_bytes()
    slot = state.free_slot
    for name, data in ((ARTEFACT, model), (NOTES, notes)):
        store.file(slot, name).parent.mkdir(parents=True, exist_ok=True)
        store.file(slot, name).write_bytes(data)
    record = Record(slot, version, sha256(model), sha256(model), len(model), sha256(notes), len(notes))
    store.commit(state.committed(record, kept=state.current))


def runtime_of(model: bytes, version: int = 1) -> Runtime:
    """The model open, without a disk."""
    release = release_of(model, version)
    installed: Any = SimpleNamespace(release=release, entry=release.variants[0])
    return Runtime(installed, CompactModel(model, SPEC))


def npy(x: np.ndarray[Any, Any]) -> bytes:
    """An array as a file."""
    file = io.BytesIO()
    np.save(file, x)
    return file.getvalue()


@dataclass(frozen=True, slots=True)
class Serving:
    """A `fedge-client serve` that is up."""

    pid: int
    path: Path  # of its socket

    def connect(self) -> http.client.HTTPConnection:
        """A connection to it."""
        connection = http.client.HTTPConnection("localhost", timeout=30)
        connection.sock = self.socket()
        return connection

    def socket(self) -> socket.socket:
        """The same without HTTP."""
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        made.settimeout(30)
        made.connect(str(self.path))
        return made


def ask(connection: http.client.HTTPConnection, body: bytes) -> int:
    """One request; its status."""
    connection.request("POST", "/v1/infer", body, {"Content-Type": "application/x-npy"})
    answer = connection.getresponse()
    answer.read()
    return answer.status


@contextmanager
def serving(home: Path, *options: str) -> Iterator[Serving]:
    """The service of a home, in a process of its own."""
    path = home / "serving" / "http.sock"
    command = [sys.executable, "-m", "fedge_client", "serve", "--home", str(home), *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, env={**os.environ, "MALLOC_ARENA_MAX": "2"}) as up:
        try:
            if up.stderr is None:
                raise AssertionError
            while b"listening" not in (line := up.stderr.readline()):
                if not line:
                    raise RuntimeError("the service did not come up")
            yield Serving(up.pid, path)
        finally:
            up.send_signal(signal.SIGTERM)


def cold_start_s(home: Path, file: Path) -> float:
    """Seconds of a whole `fedge-client infer`."""
    command = [sys.executable, "-m", "fedge_client", "infer", str(file), "--home", str(home)]
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - began
