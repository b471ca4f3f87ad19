"""What the engine's processes say to each other: safetensors documents, one after the other, in a pipe.

| from | kind | arrays | text |
|---|---|---|---|
| parent | job | `state/NAME`, and of a lesson `teacher/NAME` | `config`: the instructions |
| parent | part | indices, lengths, nodes, seeds, lane_of | `lanes`, `at_once` |
| worker | ready | none | none |
| worker | done | values, examples, losses, clients, failed | none |
| worker | refused | none | `reason` |
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import replace
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import ConfigRecord

from fedge import tensors
from fedge.dataset import Examples
from fedge.learning.local import Job
from fedge.learning.messages import Instructions
from fedge.task import resolve
from fedge_simulations.engine.lanes import Part, Sums
from fedge_simulations.trainers import Client

Arrays = Mapping[str, npt.NDArray[Any]]
Frame = tuple[str, dict[str, npt.NDArray[Any]], dict[str, str]]  # kind, arrays, text
_STATE, _TEACHER = "state/", "teacher/"
_NOTHING: Arrays = {}


def write(pipe: IO[bytes], kind: str, arrays: Arrays = _NOTHING, **text: str) -> None:
    """Send one frame.

    Raises:
        OSError: the other side is gone.
    """
    document = tensors.dump(arrays, {"kind": kind, **text})
    pipe.write(struct.pack("<Q", len(document)))
    pipe.write(document)
    pipe.flush()


def read(pipe: IO[bytes]) -> Frame:
    """Receive one frame.

    Raises:
        EOFError: the other side is gone.
        FormatError: it is none.
    """
    (size,) = struct.unpack("<Q", _exactly(pipe, 8))
    arrays, text = tensors.parse(_exactly(pipe, size))
    return text.pop("kind"), arrays, text


def _exactly(pipe: IO[bytes], size: int) -> bytes:
    found = pipe.read(size)
    if len(found) != size:
        raise EOFError("the pipe has ended")
    return found


def of_job(job: Job) -> tuple[Arrays, str]:
    """A job without its examples and seed, as arrays and text."""
    state = {_STATE + name: np.asarray(value) for name, value in job.state.items()}
    state |= {_TEACHER + name: np.asarray(value) for name, value in (job.teacher or {}).items()}
    config = job.instructions.to_config()
    if job.instructions.proximal_mu:  # which Flower's own strategy adds on the way
        config["proximal-mu"] = job.instructions.proximal_mu
    names = {"names": list(job.state), "teacher": job.teacher and list(job.teacher)}
    return state, json.dumps({"config": dict(config), **names})


def job_of(arrays: Arrays, text: str, data: Examples) -> Job:
    """The job again, over this process's own view of the data.

    Raises:
        ConfigError: its task cannot be loaded here.
    """
    read_text = json.loads(text)
    instructions = Instructions.of_config(ConfigRecord(read_text["config"]))
    state = {name: arrays[_STATE + name] for name in read_text["names"]}
    teacher = read_text["teacher"] and {name: arrays[_TEACHER + name] for name in read_text["teacher"]}
    return Job(resolve(instructions.task), instructions, state, data, 0, teacher=teacher)


def of_part(part: Part) -> Arrays:
    """A part as arrays."""
    own = [client.indices for client in part.clients]
    return {
        "indices": np.concatenate(own).astype(np.int64) if own else np.empty(0, np.int64),
        "lengths": np.array([len(indices) for indices in own], np.int64),
        "nodes": np.array([client.node_id for client in part.clients], np.int64),
        "seeds": np.array([client.seed for client in part.clients], np.int64),
        "lane_of": np.array(part.lane_of, np.int64),
    }


def part_of(arrays: Arrays, lanes: int, longest: int) -> Part:
    """The part again."""
    own = np.split(arrays["indices"], np.cumsum(arrays["lengths"])[:-1])
    names = zip(arrays["nodes"].tolist(), own, arrays["seeds"].tolist(), strict=True)
    clients = tuple(Client(node_id, indices, seed) for node_id, indices, seed in names)
    return Part(clients, tuple(arrays["lane_of"].tolist()), lanes, longest)


def of_sums(sums: Sums) -> Arrays:
    """Sums as arrays."""
    failed = json.dumps({str(node_id): reason for node_id, reason in sums.failed.items()})
    return {
        "values": sums.values.numpy(),
        "examples": sums.examples,
        "losses": sums.losses,
        "clients": sums.clients,
        "failed": np.frombuffer(failed.encode(), np.uint8),
    }


def sums_of(arrays: Arrays) -> Sums:
    """The sums again."""
    failed = json.loads(arrays["failed"].tobytes())
    made = Sums(torch.from_numpy(arrays["values"]), arrays["examples"], arrays["losses"], arrays["clients"])
    return replace(made, failed={int(node_id): reason for node_id, reason in failed.items()})
