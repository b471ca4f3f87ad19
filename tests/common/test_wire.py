"""The generated modules are those of the .proto files, and the wire stays readable for older devices."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf.descriptor import FieldDescriptor

from fedge import wire
from fedge.wire.v1 import enrolment_pb2, link_pb2, records_pb2

SOURCES = Path(__file__).parents[2] / "common"
FOLDER = SOURCES / "fedge" / "wire" / "v1"

# What a device of an earlier release writes or reads: the number of a field never changes.
FROZEN = {
    "Hello": {"wire_version": 1, "fedge_version": 2, "tasks": 3, "tags": 4},
    "Welcome": {"wire_version": 1, "server_time": 2, "device_id": 3, "tier": 4, "ca_bundle": 5},
    "Work": {
        "message_id": 1,
        "run_id": 2,
        "task": 3,
        "task_digest": 4,
        "message_type": 5,
        "group_id": 6,
        "content": 7,
        "seconds_left": 8,
        "max_result_bytes": 9,
        "node_id": 10,
    },
    "FetchRequest": {"message_id": 1, "sha256": 2, "offset": 3},
    "TurnRequest": {"message_id": 1, "kind": 2, "sha256": 3},
    "TurnReply": {"wanted": 1, "granted": 2, "offset": 3},
    "SubmitHeader": {"message_id": 1, "result": 2},
    "SubmitPart": {"header": 1, "data": 2},
    "SubmitReply": {"outcome": 1, "reason": 2},
    "EnrolRequest": {"wire_version": 1, "token": 2, "csr": 3, "sealing_key": 4},
    "EnrolReply": {"certificate": 1, "ca_bundle": 2, "device_id": 3, "tier": 4, "link_address": 5},
    "Content": {"records": 1, "object": 2},
    "Object": {"sha256": 1, "size": 2},
    "Record": {"name": 1, "kind": 2, "tensors": 3, "entries": 4},
    "Tensor": {"name": 1, "dtype": 2, "shape": 3},
    "Value": {"flag": 1, "integer": 2, "real": 3, "text": 4, "data": 5, "list": 6},
    "Result": {"content": 1, "failure": 2},
}


def test_the_generated_modules_are_current(tmp_path: Path) -> None:
    protos = sorted(FOLDER.glob("*.proto"))
    out = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", str(SOURCES), *out, *map(str, protos)]
    subprocess.run(command, check=True, capture_output=True)
    made = {path.name: path.read_text() for path in (tmp_path / "fedge" / "wire" / "v1").iterdir()}
    assert len(made) == 3 * len(protos)
    stale = [name for name, text in made.items() if (FOLDER / name).read_text() != text]
    assert stale == [], "run: make proto"


@pytest.mark.parametrize("name", FROZEN)
def test_fields_of_earlier_releases_keep_their_numbers(name: str) -> None:
    module = next(
        m for m in (link_pb2, enrolment_pb2, records_pb2) if name in m.DESCRIPTOR.message_types_by_name
    )
    fields = module.DESCRIPTOR.message_types_by_name[name].fields_by_name
    assert {key: fields[key].number for key in FROZEN[name] if key in fields} == FROZEN[name]


def test_a_message_of_a_later_release_with_unknown_fields_is_read() -> None:
    hello = link_pb2.Hello(wire_version=9, fedge_version="9.9")
    later = hello.SerializeToString() + bytes([0xFA, 0x3F, 0x03]) + b"new"  # field 1023, three bytes
    assert link_pb2.Hello.FromString(later).wire_version == 9


def test_versions_and_bounds_are_sane() -> None:
    assert 1 <= wire.OLDEST_WIRE_VERSION <= wire.WIRE_VERSION
    assert wire.CHUNK_BYTES < wire.MAX_MESSAGE_BYTES
    digest = records_pb2.Object.DESCRIPTOR.fields_by_name["sha256"]
    assert digest.type == FieldDescriptor.TYPE_BYTES
