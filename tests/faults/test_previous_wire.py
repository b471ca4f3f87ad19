"""A device of the previous wire version, replayed from a recording, still enrols, trains and is served."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from federation import Federation
from record_wire_v1 import classes

RECORDING = json.loads((Path(__file__).parent / "wire_v1.json").read_text("utf-8"))
KINDS = classes(base64.b64decode(RECORDING["definitions"]))  # nothing of this release reads or writes for it
ROUNDS = 2


def recorded(name: str) -> bytes:
    return base64.b64decode(RECORDING[name])


class OldDevice:
    """Sends recorded bytes and reads answers with the definitions of its time."""

    def __init__(self, federation: Federation) -> None:
        self.federation = federation
        self.answered: list[str] = []
        self._over = threading.Event()

    def enrol(self) -> Any:
        """Redeem a join string; the reply."""
        _, host, port, token, _ = self.federation.join_strings()[0].split(":")
        request = KINDS["EnrolRequest"].FromString(recorded("enrol"))
        request.token = token
        # The pin's check is the device's own affair, and not what this is about.
        kept = "".join(path.read_text() for path in (self.federation.home / "ca").glob("*.pem"))
        (root,) = re.findall(r"-+BEGIN CERTIFICATE-+.*?-+END CERTIFICATE-+\n", kept, re.DOTALL)
        credentials = grpc.ssl_channel_credentials(root.encode())
        with grpc.secure_channel(f"{host}:{port}", credentials) as channel:
            call = channel.unary_unary("/fedge.v1.Enrolment/Enrol")
            return KINDS["EnrolReply"].FromString(call(request.SerializeToString(), timeout=20))

    def train(self, enrolled: Any, messages: int) -> Any:
        """Connect and answer so many messages; the hub's Welcome."""
        key = RECORDING["key"].encode()
        credentials = grpc.ssl_channel_credentials(enrolled.ca_bundle, key, enrolled.certificate)
        with grpc.secure_channel(self.federation.link_address, credentials) as channel:
            call = channel.stream_stream("/fedge.v1.Link/Connect")(self._hello(), timeout=60)
            read = KINDS["HubMessage"].FromString
            welcome = read(next(call)).welcome
            for data in call:
                message = read(data)
                assert message.WhichOneof("kind") == "work", "a version 1 device knows nothing else"
                self._answer(channel, message.work)
                if len(self.answered) == messages:
                    break
            self._over.set()
        return welcome

    def _hello(self) -> Iterator[bytes]:
        yield recorded("hello")
        self._over.wait(60)  # a device keeps its side of the stream open

    def _answer(self, channel: grpc.Channel, work: Any) -> None:
        if work.content.object.size:
            request = KINDS["FetchRequest"](message_id=work.message_id, sha256=work.content.object.sha256)
            chunks = channel.unary_stream("/fedge.v1.Link/Fetch")(request.SerializeToString(), timeout=20)
            body = b"".join(KINDS["Chunk"].FromString(chunk).data for chunk in chunks)
            assert len(body) == work.content.object.size
        submit = channel.stream_unary("/fedge.v1.Link/Submit")
        reply = KINDS["SubmitReply"].FromString(submit(self._parts(work), timeout=20))
        assert reply.outcome == 1, reply.reason
        self.answered.append(work.message_type)

    def _parts(self, work: Any) -> Iterator[bytes]:
        answer = RECORDING[work.message_type]
        part = KINDS["SubmitPart"]
        header = KINDS["SubmitHeader"](message_id=work.message_id, result=base64.b64decode(answer["result"]))
        yield part(header=header).SerializeToString()
        yield part(data=base64.b64decode(answer["body"])).SerializeToString()


@pytest.mark.slow
def test_a_recorded_device_of_wire_version_1_enrols_trains_and_is_served(tmp_path: Path) -> None:
    with Federation(tmp_path, agents=0) as federation:
        old = OldDevice(federation)
        enrolled = old.enrol()
        assert enrolled.tier == "edge"
        run_id = federation.start_run(
            {"model": {"name": "logistic"}, "rounds": {"count": ROUNDS}, "clients": {"count": 1}}
        )
        welcome = old.train(enrolled, messages=1 + ROUNDS)
        assert welcome.wire_version == 1
        assert welcome.ca_bundle == enrolled.ca_bundle
        assert welcome.device_id == enrolled.device_id
        assert old.answered == ["query.moments", *["train"] * ROUNDS]
        assert federation.wait_run(run_id)["status"] == "done"
        records = [record for number, record, _ in federation.rounds(run_id) if number]
        assert [(record["clients"], record["rejected"]) for record in records] == [(1, [])] * ROUNDS
        (row,) = federation.query("SELECT wire_version FROM devices")
        assert row["wire_version"] == 1
