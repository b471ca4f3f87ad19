"""One process of a pretraining, as torch's elastic launcher starts it.

All of them begin with the run's last committed round and train on; the first one also commits, tells and
decides when to stop.
"""

from __future__ import annotations

import copy
import os
import signal
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from fedge import tensors
from fedge.config import Config
from fedge.errors import FedgeError, UserError
from fedge.learning import local
from fedge.learning.models import parameters
from fedge.task import Task, resolve
from fedge_server.data import ServerData, own_data
from fedge_server.pretraining.ending import end_with
from fedge_server.pretraining.training import Say, Trainer
from fedge_server.registry.database import Registry
from fedge_server.rounds.moments import kept_moments, moments_arrays

if TYPE_CHECKING:
    from fedge_server.pretraining.chronicle import Chronicle

_PATIENCE: Final = timedelta(hours=2)  # for one another: the first one evaluates and commits meanwhile


def main() -> int:
    """Join the others and train; arguments: folder, run, cpu or cuda, the launcher's process, quiet."""
    folder, run_id, device, parent, quiet = sys.argv[1:6]
    end_with(int(parent))
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches all of them: the launcher says so
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(len(os.sched_getaffinity(0)) // size, 1))
    place = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" else "cpu")
    if device == "cuda":
        torch.cuda.set_device(place)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    warnings.filterwarnings("ignore", ".*find_unused_parameters")  # `Trainer` says why it is asked for
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=_PATIENCE)
    try:
        with Registry.open(Path(folder)) as registry:
            quietly = rank > 0 or quiet == "quiet"
            run(registry, Path(folder), run_id, place, (lambda _: None) if quietly else _print)
    finally:
        dist.destroy_process_group()
    return 0


def run(
    registry: Registry, folder: Path, run_id: str, device: torch.device, say: Say = lambda _: None
) -> None:
    """Rounds from the last committed one until there is a reason to stop.

    Raises:
        FedgeError: the data has changed, or the loss ceased to be finite.
    """
    row, last = registry.run(run_id), registry.last_round(run_id)
    if row is None or last is None:
        raise FedgeError(f"run {run_id}: has no round 0 in {folder}")
    started, config = time.perf_counter(), Config.from_mapping(row["config"])
    task = resolve(config.task)
    data = own_data(config, task)
    if data.digest() != row["data"]:
        raise UserError(f"run {run_id}: its data has changed since it began; begin a new run")
    moments = kept_moments(last.model)
    trainer = Trainer(
        config,
        copy.deepcopy(local.first(task, config.model.name, data.spec, config.seed)),
        task.preprocess(data.spec, moments, config.model.filter),
        data.proxy,
        device,
        say,
    )
    trainer.load(last.model, last.state)
    chronicle = _chronicle(registry, folder, run_id, config, task, data) if dist.get_rank() == 0 else None
    number = last.record.round + 1
    while not _over(chronicle, device):
        began = time.perf_counter()
        loss, answers = trainer.round(number), trainer.answers(data.test.x)
        if chronicle is not None:
            kept = {**trainer.arrays(), **moments_arrays(moments)}
            seconds = time.perf_counter() - began
            say(chronicle.line(chronicle.commit(number, loss, seconds, answers, kept, trainer.state())))
        number += 1
    if chronicle is not None:
        arrays = trainer.arrays()
        sizes = {
            "parameters": parameters(trainer.network),
            "bytes": sum(map(len, tensors.dump_chunks(arrays))),
        }
        chronicle.conclude(
            sizes,
            {
                "processes": dist.get_world_size(),
                "device": device.type,
                "seconds": round(time.perf_counter() - started, 2),
            },
        )


def _chronicle(
    registry: Registry, folder: Path, run_id: str, config: Config, task: Task, data: ServerData
) -> Chronicle:
    from fedge_server.pretraining.chronicle import Chronicle  # loads what the other processes do not need

    return Chronicle(registry, folder, run_id, config, task, data)


def _over(chronicle: Chronicle | None, device: torch.device) -> bool:
    """Whether the first process sees a reason to stop."""
    stop = torch.tensor([int(chronicle is not None and chronicle.why_stop is not None)], device=device)
    dist.broadcast(stop, 0)
    return bool(stop.item())


def _print(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _guarded() -> int:
    """The launcher reads what went wrong from a file; stderr is for faults of fedge."""
    try:
        return record(main)() or 0
    except FedgeError:
        return 1
    except RuntimeError as error:
        if "gloo" in str(error).lower() or isinstance(error, dist.DistError):
            return 1  # another process has ended; the launcher names it
        raise


if __name__ == "__main__":
    code = _guarded()
    sys.stdout.flush()
    sys.stderr.flush()
    # Everything is closed. Python's own end would meet torch's threads, one of which has aborted a process
    # whose work was done: the launcher then ends the first one, which may be writing the summary.
    os._exit(code)
