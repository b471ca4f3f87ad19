"""Rounds as TensorBoard's scalars."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedge.config import Config
from fedge.errors import UserError
from fedge_server.rounds.loop import Observer
from fedge_server.rounds.record import RoundRecord


def check_installed() -> None:
    """Refuse early what would fail at the first round.

    Raises:
        UserError: the package tensorboard is not there.
    """
    try:
        import torch.utils.tensorboard  # noqa: F401 - whether it can be is the question
    except ImportError as error:
        raise UserError('--tensorboard: needs a package more; pip install "fedge[tensorboard]"') from error


@contextmanager
def exporting(folder: Path, config: Config) -> Iterator[Observer]:
    """An observer that writes each round as TensorBoard's events, readable while the run goes on.

    What an interrupted or replaced run left in the folder is taken back: a resumed run tells its earlier
    rounds again.

    Raises:
        UserError: the package tensorboard is not there, or the folder cannot be written.
    """
    check_installed()
    from torch.utils.tensorboard import SummaryWriter

    try:
        writer = SummaryWriter(str(folder), purge_step=0)
    except OSError as error:
        raise UserError(f"--tensorboard {folder}: cannot be written ({error.strerror})") from error
    try:
        text = json.dumps(config.to_mapping(), indent=2)
        writer.add_text("configuration", f"```json\n{text}\n```", 0)

        def observe(record: RoundRecord) -> None:
            for name, value in scalars(record).items():
                writer.add_scalar(name, value, record.round)
            writer.flush()

        yield observe
    finally:
        writer.close()


def scalars(record: RoundRecord) -> dict[str, float]:
    """A round's numbers by the names that TensorBoard shows."""
    found = {f"test/{name}": value for name, value in record.metrics.items() if isinstance(value, float)}
    found |= {f"clients/{name}": value for name, value in record.client_metrics.items()}
    if record.train_loss is not None:
        found["train/loss"] = record.train_loss
    if record.seconds:
        found["speed/clients_per_second"] = record.clients / record.seconds
    if record.simulated_s is not None:
        found["speed/simulated_s"] = record.simulated_s
    return found | {
        "speed/seconds": record.seconds,
        "updates/used": record.clients,
        "updates/not_used": record.failures,
        "traffic/bytes_up": record.bytes_up,
        "traffic/bytes_down": record.bytes_down,
    }
