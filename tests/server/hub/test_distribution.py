"""The distribution service on a hub that is up: real certificates, a real repository, real rollouts."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from places import Place, model_of, released, repository

from fedge.artefact import pack
from fedge.delivery import target_path
from fedge.errors import SealError
from fedge.sealing import Place as Sealed
from fedge.sealing import key_id, unseal, unwrap
from fedge.wire.v1 import distribution_pb2 as pb
from fedge.wire.v1 import enrolment_pb2 as enrolment
from fedge.wire.v1.distribution_pb2_grpc import DistributionStub
from fedge.wire.v1.enrolment_pb2_grpc import EnrolmentStub
from fedge_server.delivery import service
from fedge_server.delivery.sealing import Sealing
from fedge_server.delivery.shelf import Shelf
from fedge_server.identity.tokens import new_join_string
from fedge_server.registry import schema
from fedge_server.registry.engine import writing
from fedge_server.repository import ContentKeys
from fedge_server.repository.folder import hashed_path
from fedge_server.rollout.evidence import Criterion
from fedge_server.rollout.plan import Plan, Stage
from fedge_server.rollout.service import Rollouts

WAIT_S = 10.0
CODE = grpc.StatusCode
_PEM = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def stub_of(device: Any) -> DistributionStub:
    key = device.key.private_bytes(*_PEM)
    credentials = grpc.ssl_channel_credentials(device.roots, key, device.certificate)
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", 4 * 1024**2)]
    channel = grpc.aio.secure_channel(f"localhost:{device.port()}", credentials, options)
    device.channels.append(channel)
    return DistributionStub(channel)


async def fetched(stub: Any, name: str, offset: int = 0, maximum: int = 0) -> bytes:
    call = stub.Fetch(pb.FileRequest(name=name, offset=offset, maximum=maximum), timeout=WAIT_S)
    return b"".join([part.data async for part in call])


async def refused(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asyncio.wait_for(call, WAIT_S)
    return caught.value.code(), caught.value.details() or ""


def poll(stub: Any, **fields: Any) -> Any:
    return stub.Poll(pb.PollRequest(wire_version=2, **fields), timeout=WAIT_S)


@pytest.mark.slow
def test_a_device_reads_its_tiers_files_from_any_byte_on(hub: Any) -> None:
    async def play(rig: Any) -> None:
        place = repository(rig)
        released(rig, place, 1)
        stub = stub_of(rig.device())
        files = place.files()
        mine = {name for name in files if "board" not in name}
        for name in mine:
            assert await fetched(stub, name) == files[name]
        (model,) = (name for name in mine if name.endswith(".model"))
        size = len(files[model])
        for offset in (1, size - 1, size):
            assert await fetched(stub, model, offset) == files[model][offset:]
        assert await fetched(stub, model, 3, 5) == files[model][3:8]
        assert (await refused(fetched(stub, model, size + 1)))[0] == CODE.OUT_OF_RANGE
        for name in set(files) - mine:
            code, details = await refused(fetched(stub, name))
            assert code == CODE.PERMISSION_DENIED, name
            assert "tier" in details
        for name in ("metadata/9.root.json", "metadata/../keys/root.key", "x" * 600, "state/lock"):
            assert (await refused(fetched(stub, name)))[0] in (CODE.NOT_FOUND, CODE.INVALID_ARGUMENT)

    hub(play)


def test_without_a_repository_there_is_nothing(hub: Any) -> None:
    async def play(rig: Any) -> None:
        stub = stub_of(rig.device())
        assert (await poll(stub)).version == 0
        assert (await refused(fetched(stub, "metadata/timestamp.json")))[0] == CODE.NOT_FOUND

    hub(play)


def test_nobody_without_a_certificate_of_ours_is_served(hub: Any) -> None:
    async def play(rig: Any) -> None:
        device = rig.device()
        channel = grpc.aio.secure_channel(
            f"localhost:{device.port()}", grpc.ssl_channel_credentials(device.roots)
        )
        assert (await refused(poll(DistributionStub(channel))))[0] == CODE.UNAVAILABLE
        await channel.close()

    hub(play)


@pytest.mark.slow
def test_a_tier_that_never_had_a_rollout_gets_its_newest_release(hub: Any) -> None:
    async def play(rig: Any) -> None:
        place = repository(rig)
        version = released(rig, place, 1, "micro")
        await rig.hub.refresh()
        micro, board = (stub_of(rig.device(tier=tier)) for tier in ("micro", "board"))
        reply = await poll(micro)
        assert (reply.version, reply.root, reply.timestamp) == (version, 1, 4)
        assert 0 <= reply.again_s <= service.AGAIN_S
        assert (await poll(micro, has=version)).version == 0
        assert (await poll(board)).version == 0

    hub(play)


@pytest.mark.slow
def test_a_waiting_device_hears_of_a_release_when_it_is_published(hub: Any) -> None:
    async def play(rig: Any) -> None:
        place = repository(rig)
        released(rig, place, 1, "micro")
        await rig.hub.refresh()
        stub = stub_of(rig.device())
        told = (await poll(stub)).version
        waits = asyncio.create_task(_soon(stub, told))
        await asyncio.sleep(0.3)
        assert not waits.done()  # what it has heard already is no news
        newer = released(rig, place, 2, "micro")
        assert (await asyncio.wait_for(waits, WAIT_S)).version == newer  # the hub looks by itself
        began = time.monotonic()
        assert (await poll(stub, has=newer, wait_s=0.3)).version == 0
        assert time.monotonic() - began > 0.25

    hub(play)


async def _soon(stub: Any, told: int) -> Any:
    return await poll(stub, told=told, wait_s=8)


@pytest.mark.slow
def test_newer_metadata_is_news_too(hub: Any) -> None:
    async def play(rig: Any) -> None:
        place = repository(rig)
        version = released(rig, place, 1, "micro")
        await rig.hub.refresh()
        stub = stub_of(rig.device())
        role = (await poll(stub)).tier_role
        waits = asyncio.create_task(_role(stub, version, role))
        await asyncio.sleep(0.1)
        place.repository.raise_floor("micro", version, place.of("tier-micro"))
        await rig.hub.refresh()
        reply = await asyncio.wait_for(waits, WAIT_S)
        assert (reply.version, reply.tier_role) == (0, role + 1)

    hub(play)


async def _role(stub: Any, has: int, role: int) -> Any:
    return await poll(stub, has=has, tier_role=role, wait_s=8)


PLAN = Plan(
    (Stage("lab", devices=frozenset({"?"}), percent=0, hold_s=0), Stage("all", percent=100, hold_s=0)),
    (Criterion("install", tolerated=0.02, unacceptable=0.5, at_least=1),),
)


def plan_for(device: Any) -> Plan:
    first = Stage("lab", devices=frozenset({device.id}), percent=0, hold_s=0)
    return Plan((first, PLAN.stages[1]), PLAN.criteria)


@pytest.mark.slow
def test_a_rollout_says_who_gets_what_and_reports_move_it(hub: Any) -> None:
    async def play(rig: Any) -> None:
        place = repository(rig)
        first = released(rig, place, 1, "micro")
        canary, other = rig.device(), rig.device()
        stubs = stub_of(canary), stub_of(other)
        rollouts = Rollouts(rig.registry)
        rollouts.start(first, "micro", plan_for(canary), who="ann")
        await rig.hub.refresh()
        assert [(await poll(stub)).version for stub in stubs] == [first, 0]
        waits = asyncio.create_task(_soon(stubs[1], 0))
        await asyncio.sleep(0.1)
        kinds = pb.NoteReply.Outcome
        report = pb.Report(version=first, kind="installed", value=1)
        replies = [await stubs[0].Note(pb.NoteRequest(reports=[report, report])) for _ in range(2)]
        found = [[outcome.kind for outcome in reply.outcomes] for reply in replies]
        assert found == [[kinds.COUNTED, kinds.KNOWN], [kinds.KNOWN, kinds.KNOWN]]
        assert (await asyncio.wait_for(waits, WAIT_S)).version == first  # the next stage has opened

    hub(play)


@pytest.mark.slow
def test_bad_reports_are_refused_one_by_one(hub: Any) -> None:
    async def play(rig: Any) -> None:
        version = released(rig, repository(rig), 1, "micro")
        stub = stub_of(rig.device())
        good = pb.Report(version=version, kind="healthy", value=1)
        bad = [
            pb.Report(version=version, kind="wonderful", value=1),
            pb.Report(version=99, kind="healthy", value=1),
            pb.Report(version=2**63, kind="healthy", value=1),
            pb.Report(version=version, kind="confidence", value=float("nan")),
            pb.Report(version=version, kind="latency_ms", value=-1),
        ]
        reply = await stub.Note(pb.NoteRequest(reports=[*bad, good]))
        kinds = pb.NoteReply.Outcome
        assert [outcome.kind for outcome in reply.outcomes] == [*[kinds.REFUSED] * len(bad), kinds.COUNTED]
        assert all(outcome.reason for outcome in reply.outcomes[: len(bad)])
        many = pb.NoteRequest(reports=[good] * (service.MAX_REPORTS + 1))
        assert (await refused(stub.Note(many)))[0] == CODE.INVALID_ARGUMENT

    hub(play)


@pytest.mark.slow
def test_a_version_that_metadata_does_not_list_is_not_offered(hub: Any) -> None:
    async def play(rig: Any) -> None:
        place = repository(rig)
        version = released(rig, place, 1, "micro")
        rig.registry.record_release(
            version=version + 1,
            run_id="run-1",
            round_number=1,
            global_model="",
            manifest=b"",
            variants=[{"tier": "micro", "recipe": "", "wire": "", "installed": "c" * 64, "evidence": ""}],
        )
        device = rig.device()
        Rollouts(rig.registry).start(version + 1, "micro", who="ann")
        await rig.hub.refresh()
        assert (await poll(stub_of(device))).version == 0

    hub(play)


@pytest.mark.slow
def test_a_revoked_device_is_sent_away_from_a_poll_and_a_stream(hub: Any) -> None:
    async def play(rig: Any) -> None:
        place = repository(rig)
        released(rig, place, 1, "micro")
        device = rig.device()
        stub = stub_of(device)
        await fetched(stub, "metadata/timestamp.json")
        waits = asyncio.create_task(_soon(stub, 1))
        await asyncio.sleep(0.2)
        rig.registry.devices.revoke(device.id, "stolen")
        await rig.hub.refresh()
        assert (await refused(waits))[0] == CODE.PERMISSION_DENIED
        assert (await refused(fetched(stub, "metadata/timestamp.json")))[0] == CODE.PERMISSION_DENIED
        for call in (stub.Key(pb.KeyRequest(version=1)), stub.Note(pb.NoteRequest())):
            assert (await refused(call))[0] == CODE.PERMISSION_DENIED

    hub(play)


@pytest.mark.slow
def test_a_hub_that_stops_answers_those_who_wait(hub: Any) -> None:
    async def play(rig: Any) -> None:
        stub = stub_of(rig.device())
        await poll(stub)
        waits = asyncio.create_task(_soon(stub, 1))
        await asyncio.sleep(0.2)
        await rig.down()
        assert (await asyncio.wait_for(waits, WAIT_S)).version == 0

    hub(play)


def big(rig: Any, megabytes: int) -> str:
    """A file of micro that no publisher has written: the service asks nobody what is in it."""
    name = f"targets/micro/{'e' * 64}.1.model"
    path = rig.home.repository / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(megabytes * 1024**2)
    return name


@pytest.mark.slow
def test_who_reads_nothing_is_cut_and_holds_up_nobody(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "STILL_S", 0.4)

    async def play(rig: Any) -> None:
        name = big(rig, 64)
        stalled = [stub_of(rig.device()) for _ in range(4)]
        calls = [stub.Fetch(pb.FileRequest(name=name)) for stub in stalled for _ in range(3)]
        for call in calls:
            assert (await asyncio.wait_for(call.read(), WAIT_S)).data
        stub = stub_of(rig.device())
        await poll(stub)
        took = []
        for _ in range(10):
            began = time.monotonic()
            await poll(stub)
            took.append(time.monotonic() - began)
        assert sorted(took)[5] < 0.2
        await asyncio.sleep(0.8)
        assert (await refused(_rest(calls[0])))[0] == CODE.DEADLINE_EXCEEDED

    hub(play)


async def _rest(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


def test_a_device_has_so_many_streams_and_no_more(hub: Any) -> None:
    async def play(rig: Any) -> None:
        name = big(rig, 16)
        stub = stub_of(rig.device())
        calls = [stub.Fetch(pb.FileRequest(name=name)) for _ in range(4)]
        for call in calls:
            await call.read()
        assert (await refused(fetched(stub, name)))[0] == CODE.RESOURCE_EXHAUSTED
        calls[0].cancel()

        found = b""
        while not found:  # until the hub has heard of the end
            with suppress(grpc.aio.AioRpcError):
                found = await fetched(stub, name, 0, 10)
        assert len(found) == 10

    hub(play)


def test_where_no_more_may_wait_the_answer_comes_at_once_with_a_long_pause(
    hub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service.Waiting, "has_room", lambda *_: False)

    async def play(rig: Any) -> None:
        reply = await poll(stub_of(rig.device()), wait_s=8)
        assert service.AGAIN_FULL_S / 2 <= reply.again_s <= service.AGAIN_FULL_S

    hub(play)


@pytest.mark.slow
def test_requests_that_cannot_be_are_refused(hub: Any) -> None:
    async def play(rig: Any) -> None:
        stub = stub_of(rig.device())
        for fields in ({"tags": ["t"] * 300}, {"tags": ["t" * 300]}, {"has": 2**63}):
            assert (await refused(poll(stub, **fields)))[0] == CODE.INVALID_ARGUMENT
        assert (await poll(stub, wait_s=float("nan"))).version == 0
        assert (await refused(stub.Key(pb.KeyRequest(version=7))))[0] == CODE.NOT_FOUND

    hub(play)


@pytest.mark.slow
def test_enrolment_hands_out_the_root_and_the_floor_of_the_tier(hub: Any, tools: Any) -> None:
    async def play(rig: Any) -> None:
        place = repository(rig)
        version = released(rig, place, 1, "micro")
        place.repository.raise_floor("micro", version, place.of("tier-micro"))
        host = {"host": "localhost", "port": rig.hub.enrolment_port, "pin": rig.authority.pin}
        join = new_join_string(rig.registry.devices, "micro", hours=1, now=time.time(), **host)
        request = enrolment.EnrolRequest(
            wire_version=2, token=join.token, csr=tools.csr_of(ec.generate_private_key(ec.SECP256R1())),
            sealing_key=bytes(32),
        )  # fmt: skip
        credentials = grpc.ssl_channel_credentials(rig.authority.bundle)
        async with grpc.aio.secure_channel(f"localhost:{rig.hub.enrolment_port}", credentials) as channel:
            reply = await EnrolmentStub(channel).Enrol(request, timeout=WAIT_S)
        assert (reply.trusted_root, reply.floor) == (place.first_root, version)

    hub(play)


def sealing(rig: Any) -> tuple[Place, ContentKeys]:
    keys = ContentKeys(rig.home.keys / "content")
    return Place(rig.home.repository, options={"content_keys": keys}).make(), keys


def enrolled(rig: Any, tier: str = "micro") -> tuple[Any, X25519PrivateKey]:
    """A device with a sealing key."""
    device, private = rig.device(tier=tier), X25519PrivateKey.generate()
    table = schema.devices
    with writing(rig.registry.engine) as connection:
        changed = {"sealing_key": private.public_key().public_bytes_raw().hex()}
        connection.execute(table.update().where(table.c.id == device.id).values(**changed))
    return device, private


@pytest.mark.slow
def test_a_device_fetches_a_ciphertext_and_a_key_that_only_it_unwraps(hub: Any) -> None:
    async def play(rig: Any) -> None:
        place, keys = sealing(rig)
        version = released(rig, place, 1)
        await rig.hub.refresh()
        device, private = enrolled(rig)
        stub = stub_of(device)
        wrapped = (await stub.Key(pb.KeyRequest(version=version))).wrapped
        name = {"tier": "micro", "version": version, "device_id": device.id}
        key = unwrap(wrapped, private, **name, expected=key_id(keys.key("micro", version)))
        entry = place.repository.content("micro").releases[version].files["model"]
        path = hashed_path(target_path("micro", version, "model"), entry.sha256)
        ciphertext = await fetched(stub, f"targets/{path}")
        assert unseal(ciphertext, key, Sealed("micro", version)) == pack(model_of(1))
        with pytest.raises(SealError):
            unwrap(wrapped, enrolled(rig)[1], **name, expected=key_id(key))

    hub(play)


@pytest.mark.slow
def test_no_key_is_given_for_another_tier_a_version_not_on_offer_or_to_a_revoked_device(hub: Any) -> None:
    async def play(rig: Any) -> None:
        place, _ = sealing(rig)
        version = released(rig, place, 1, "micro")
        await rig.hub.refresh()
        (device, _), (other, _) = enrolled(rig), enrolled(rig, "board")
        stub = stub_of(device)
        assert (await refused(stub_of(other).Key(pb.KeyRequest(version=version))))[0] == CODE.NOT_FOUND
        assert (await refused(stub.Key(pb.KeyRequest(version=version + 1))))[0] == CODE.NOT_FOUND
        assert (await stub.Key(pb.KeyRequest(version=version))).wrapped
        rig.registry.devices.revoke(device.id, "stolen")
        await rig.hub.refresh()
        assert (await refused(stub.Key(pb.KeyRequest(version=version))))[0] == CODE.PERMISSION_DENIED

    hub(play)


@pytest.mark.slow
def test_what_is_made_for_deltas_is_opened_and_sealed_as_the_version_is(hub: Any) -> None:
    async def play(rig: Any) -> None:
        place, keys = sealing(rig)
        released(rig, place, 1, "micro")
        place.options = {}
        released(rig, place, 2, "micro")
        shelf = Shelf(rig.home.repository)
        shelf.refresh()
        opens = Sealing(shelf, keys)
        assert [opens.content("micro", version)[0] for version in (1, 2)] == [
            pack(model_of(n)) for n in (1, 2)
        ]
        sealed = opens.delta("micro", 1, b"made")
        assert unseal(sealed, keys.key("micro", 1), Sealed("micro", 1, "delta")) == b"made"
        assert opens.delta("micro", 2, b"made") == b"made"
        assert opens.key_for(rig.registry.devices, enrolled(rig)[0].id, "micro", 2) is None

    hub(play)
