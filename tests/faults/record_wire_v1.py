"""Makes `wire_v1.json`: what a device of wire version 1 puts on the network, and how it reads answers.

Run once, when version 1 was current; the recording must not be made anew, or it proves nothing. Only the
message's id, which the hub chooses, and the token are put in when it is replayed.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

HERE = Path(__file__).parent
PROTOS = HERE.parents[1] / "common" / "fedge" / "wire" / "v1"
FILES = ("records.proto", "link.proto", "enrolment.proto")
LATER = re.compile(r"^.*\(version 2\).*\n|^.*rpc Turn.*\n", re.MULTILINE)


def descriptors() -> bytes:
    """The definitions as of version 1: what version 2 added is not in them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "fedge" / "wire" / "v1"
        folder.mkdir(parents=True)
        for file in FILES:
            text = (PROTOS / file).read_text()
            text = re.sub(
                r"// Nobody waits.*?\n}\n|// The certificate authority's bundle.*?\n}\n", "", text, flags=re.S
            )
            text = re.sub(r"^ +(Cancel|NewBundle) .*\n", "", text, flags=re.MULTILINE)
            text = re.sub(r"^message Turn\w+ \{.*?^\}\n", "", text, flags=re.MULTILINE | re.DOTALL)
            (folder / file).write_text(LATER.sub("", text))
        out = Path(name) / "set.bin"
        names = [f"fedge/wire/v1/{file}" for file in FILES]
        command = [
            sys.executable,
            "-m",
            "grpc_tools.protoc",
            "-I",
            name,
            f"--descriptor_set_out={out}",
            *names,
        ]
        subprocess.run(command, check=True)
        return out.read_bytes()


def classes(data: bytes) -> dict[str, Any]:
    """Message classes by name, of a descriptor set."""
    files = descriptor_pb2.FileDescriptorSet.FromString(data).file
    found = message_factory.GetMessages(list(files), pool=descriptor_pool.DescriptorPool())
    return {name.removeprefix("fedge.v1."): kind for name, kind in found.items()}


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def main() -> None:
    definitions = descriptors()
    kinds = classes(definitions)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "device")])
    csr = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    enrol = kinds["EnrolRequest"](
        wire_version=1, csr=csr.public_bytes(serialization.Encoding.DER), sealing_key=bytes(range(32))
    )
    hello = kinds["DeviceMessage"]()
    hello.hello.wire_version, hello.hello.fedge_version = 1, "0.2.0"
    hello.hello.tasks.add(name="digits", digest=hashlib.sha256(b"fedge:digits:1").hexdigest())
    hello.hello.cores, hello.hello.memory_bytes = 1, 2**30
    rng = np.random.default_rng(0)
    update = {
        "1.weight": rng.normal(0, 0.05, (10, 64)).astype("<f4"),
        "1.bias": np.zeros(10, "<f4"),
    }
    moments = {
        "count": np.array([50 * 64.0]),
        "total": np.array([50 * 64 * 4.9]),
        "squares": np.array([50 * 64 * (4.9**2 + 6.0**2)]),
    }
    recording = {
        "definitions": text(definitions),
        "key": key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ).decode(),
        "enrol": text(enrol.SerializeToString()),
        "hello": text(hello.SerializeToString()),
        "train": answer(kinds, "arrays", update, {"num-examples": 50, "train_loss": 2.3}),
        "query.moments": answer(kinds, "moments", moments, {"num-examples": 50}),
    }
    (HERE / "wire_v1.json").write_text(json.dumps(recording, indent=1) + "\n")


def answer(
    kinds: dict[str, Any], name: str, arrays: dict[str, Any], metrics: dict[str, float]
) -> dict[str, str]:
    body = b"".join(array.tobytes() for array in arrays.values())
    result = kinds["Result"]()
    record = result.content.records.add(name=name, kind=1)
    for key, array in arrays.items():
        record.tensors.add(name=key, dtype=str(array.dtype), shape=array.shape)
    record = result.content.records.add(name="metrics", kind=2)
    for key, value in metrics.items():
        entry = record.entries.add(key=key)
        if isinstance(value, int):
            entry.value.integer = value
        else:
            entry.value.real = value
    result.content.object.sha256, result.content.object.size = hashlib.sha256(body).digest(), len(body)
    return {"result": text(result.SerializeToString()), "body": text(body)}


if __name__ == "__main__":
    main()
