"""The folder of a server: what lies where, and what only the server's user may read."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedge.errors import UserError

RUN_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""Names a run, and its folders."""


@dataclass(frozen=True, slots=True)
class Home:
    """Paths under one home folder; nothing is created by naming it."""

    root: Path

    @classmethod
    def chosen(cls, given: Path | None) -> Home:
        """The home of a command line: `--home`, else FEDGE_HOME.

        Raises:
            UserError: neither is given.
        """
        folder = given or os.environ.get("FEDGE_HOME")
        if not folder:
            raise UserError("which home folder? give --home DIR or set FEDGE_HOME")
        return cls(Path(folder).absolute())

    @property
    def settings(self) -> Path:
        """`server.toml`."""
        return self.root / "server.toml"

    @property
    def database(self) -> Path:
        """The SQLite database, unless the settings name another by URL."""
        return self.root / "fedge.db"

    @property
    def socket(self) -> Path:
        """The unix socket on which the hub serves workers and the command line."""
        return self.root / "hub.sock"

    @property
    def lock(self) -> Path:
        """Held with flock while a hub is up."""
        return self.root / "hub.lock"

    @property
    def ports(self) -> Path:
        """`{"link": PORT, "enrolment": PORT}` while a hub is up."""
        return self.root / "ports.json"

    @property
    def ca(self) -> Path:
        """Keys and certificates of the certificate authority."""
        return self.root / "ca"

    @property
    def tls(self) -> Path:
        """The server's own key and certificate."""
        return self.root / "tls"

    @property
    def store(self) -> Path:
        """The content store: models and strategy states of rounds."""
        return self.root / "store"

    @property
    def repository(self) -> Path:
        """The signed repository of releases, which devices read."""
        return self.root / "repository"

    @property
    def deltas(self) -> Path:
        """Deltas between releases, made when devices ask for them; may be removed."""
        return self.root / "deltas"

    @property
    def exports(self) -> Path:
        """Global models of releases as ONNX, which answer devices; may be made again."""
        return self.root / "exports"

    @property
    def keys(self) -> Path:
        """Keys of the repository that are kept here."""
        return self.root / "keys"

    @property
    def all_objects(self) -> Path:
        """A folder for each run under way, see `objects`."""
        return self.root / "objects"

    def objects(self, run_id: str) -> Path:
        """Tensors of a run going down to devices, by SHA-256; written by the run's worker."""
        return self.all_objects / run_id

    @property
    def all_spools(self) -> Path:
        """A folder for each run under way, see `spool`."""
        return self.root / "spool"

    def spool(self, run_id: str) -> Path:
        """Tensors of a run that came up from devices; written by the hub."""
        return self.all_spools / run_id

    @property
    def runs(self) -> Path:
        """One folder for each run."""
        return self.root / "runs"

    def run(self, run_id: str) -> Path:
        """Log, results and lock of one run."""
        return self.runs / run_id

    def run_model(self, run_id: str) -> Path:
        """The global model that a run has learned, written once its rounds are over."""
        return self.run(run_id) / "model.safetensors"

    def run_log(self, run_id: str) -> Path:
        """What the run's worker has printed."""
        return self.run(run_id) / "log"

    def worker_lock(self, run_id: str) -> Path:
        """Held with flock by the run's worker."""
        return self.run(run_id) / "worker.lock"
