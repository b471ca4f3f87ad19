"""The resident agent: keeps a connection to the hub, takes work, and sends answers until the hub has them."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from pathlib import Path
from typing import Final

import grpc

import fedge
from fedge.errors import FedgeError, FormatError, IdentityError
from fedge.logs import security
from fedge.wire import WIRE_VERSION
from fedge.wire.v1 import link_pb2 as pb
from fedge_client.agent import status
from fedge_client.agent.child import TrainingChild
from fedge_client.agent.connection import Closed, Link, backoff, said
from fedge_client.agent.delivery import Keeper
from fedge_client.agent.diagnosis import diagnose
from fedge_client.agent.enrolment import renew
from fedge_client.agent.figures import COUNTED, Textfile
from fedge_client.agent.identity import Identity
from fedge_client.agent.objects import ObjectCache
from fedge_client.agent.outbox import Outbox
from fedge_client.agent.settings import AgentSettings
from fedge_client.agent.telling import Teller
from fedge_client.agent.work import Linked, Offer, Workshop

STABLE_S: Final = 60.0  # a connection that held so long was no failed attempt
REFUSED_DELAY_S: Final = 600.0  # between attempts of a device that the hub refuses
RENEWAL_CHECK_S: Final = 60.0
ONCE_QUIET_S: Final = 5.0  # with --once: nothing to do for so long is the end
DIAGNOSE_EVERY_S: Final = 60.0

log = logging.getLogger("fedge.agent")


class Agent:
    """One device's agent; `run` is its whole life."""

    def __init__(
        self, home: Path, settings: AgentSettings, digests: dict[str, str], identity: Identity
    ) -> None:
        self._home, self._settings, self._identity = home, settings, identity
        self._offers = {task.name: Offer(task, digests[task.name]) for task in settings.tasks}
        self._rng = random.Random()  # noqa: S311 - spreads devices over time, protects nothing
        self._linked = Linked()
        self._to_send = asyncio.Event()
        self._outbox = Outbox(home / "outbox")
        facts = {"server": identity.hub.link_address, "tasks": digests, "child": "not started"}
        self._status = status.Status(home, facts)
        self._child = TrainingChild(home, settings.training, self._child_changed)
        self._workshop = Workshop(
            home,
            self._offers,
            cache=ObjectCache(home / "cache" / "objects", settings.link.max_cache_bytes),
            outbox=self._outbox,
            child=self._child,
            linked=self._linked,
            changed=self._work_changed,
        )
        self._delivery = ""  # in words
        self._keeper = Keeper(home, settings, linked=self._linked, changed=self._delivery_changed)
        self._teller = Teller(
            home,
            settings.telemetry,
            linked=self._linked,
            changed=lambda words: self._status.show(telemetry=words),
        )
        found = settings.metrics
        self._figures = (
            Textfile(found.textfile, home, lambda: self._status.facts, found.interval_s)
            if found.textfile is not None
            else None
        )
        self._last_work = time.monotonic()
        self._diagnosed = self._renewed = float("-inf")  # when, by the monotonic clock
        if self._outbox.waiting():
            self._to_send.set()

    async def run(self, *, once: bool = False) -> int:
        """Work until cancelled; with `once`, until there is nothing to do. Returns the exit code."""
        self._status.show(state="connecting", detail="", working=[], outbox=len(self._outbox.waiting()))
        status.notify("READY=1\nSTATUS=connecting")
        works = [self._workshop.run(), self._send_all(), self._keeper.run(), self._teller.run()]
        if self._figures is not None:
            works.append(self._figures.run())
        others = [asyncio.create_task(work) for work in works]
        ours = asyncio.create_task(self._once() if once else self._connect_for_ever())
        try:
            done, _ = await asyncio.wait([ours, *others], return_when=asyncio.FIRST_COMPLETED)
            return next(iter(done)).result() or 0
        finally:
            for task in (ours, *others):
                task.cancel()
            await asyncio.gather(ours, *others, return_exceptions=True)
            await self._child.stop()
            self._status.show(state="stopped", detail="", working=[], child="ended")
            self._status.write()
            if self._figures is not None:
                self._figures.write(COUNTED.values(), self._status.facts)

    # --- the connection

    async def _connect_for_ever(self) -> int:
        attempt = 0
        while True:
            started = time.monotonic()
            fault, refused = await self._attempt()
            attempt = 1 if time.monotonic() - started >= STABLE_S else attempt + 1
            maximum = self._settings.link.backoff_max_s
            delay = backoff(attempt, maximum, self._rng)
            if refused:
                delay = self._rng.uniform(REFUSED_DELAY_S / 2, REFUSED_DELAY_S)
            state = "refused" if refused else "waiting"
            self._show(state, fault)
            if refused:
                security("server_refused", "%s", fault, device=self._identity.device_id)
            log.warning("%s; next attempt in %.1f s", fault, delay)
            await asyncio.sleep(delay)

    async def _once(self) -> int:
        """One connection: do what waits, then end."""
        session = asyncio.create_task(self._attempt())
        while not session.done():
            await asyncio.wait([session], timeout=0.2)
            idle = time.monotonic() - self._last_work
            waits = self._keeper.is_busy or self._teller.is_busy
            busy = self._workshop.held() or self._outbox.waiting() or waits
            if self._linked.is_set and not busy and idle > ONCE_QUIET_S:
                session.cancel()
                await asyncio.wait([session])
                return 0
        fault, _ = session.result()
        log.error("%s", fault)
        return 1

    async def _attempt(self) -> tuple[str, bool]:
        """Connect and stay connected; returns why that ended, and whether the hub refuses this device."""
        self._show("connecting", "")
        try:
            await self._renew_before_connecting()
            async with Link(lambda: self._identity) as link:
                await self._session(link)
            return "the server ended the connection", False
        except grpc.RpcError as error:
            return await self._explained(error)
        except IdentityError as error:
            return str(error), True
        except (FedgeError, OSError) as error:
            return str(error), False
        finally:
            self._linked.set(None)

    async def _explained(self, error: grpc.RpcError) -> tuple[str, bool]:
        """An outage or a certificate problem? gRPC alone does not tell: see `diagnosis`."""
        if error.code() is grpc.StatusCode.PERMISSION_DENIED:
            return said(error), True
        if error.code() is grpc.StatusCode.UNAUTHENTICATED:
            return await self._renew_refused(said(error))
        if time.monotonic() - self._diagnosed < DIAGNOSE_EVERY_S:
            return said(error), False
        found = await asyncio.to_thread(diagnose, self._identity, self._identity.hub.link_address)
        self._diagnosed = time.monotonic()
        self._status.show(diagnosis=found.kind)
        if found.renewable:
            return await self._renew_refused(found.detail)
        return (said(error) if found.kind == "ok" else f"{found.kind}: {found.detail}"), False

    async def _session(self, link: Link) -> None:
        welcome = await link.greet(self._hello())
        self._keep_bundle(welcome.ca_bundle)
        device, address = self._identity.device_id, self._identity.hub.link_address
        log.info("connected to %s as %s", address, device[:16], extra={"device": device, "address": address})
        self._last_work = time.monotonic()
        self._linked.set(link)
        COUNTED.add("fedge_agent_connections_total")
        skew = time.time() - welcome.server_time
        self._show(
            "connected", "", wire=link.wire_version, connected_since=time.time(), clock_skew_s=round(skew)
        )
        renewal = asyncio.create_task(self._renew_in_time(link))
        try:
            async for message in link.messages():
                self._handle(message)
        finally:
            self._status.show(last_contact=time.time())
            renewal.cancel()
            await asyncio.gather(renewal, return_exceptions=True)

    def _handle(self, message: pb.HubMessage) -> None:
        kind = message.WhichOneof("kind")
        self._last_work = time.monotonic()
        if kind == "work":
            self._workshop.take(message.work)
        elif kind == "cancel":
            self._workshop.cancel(message.cancel.message_id)
        elif kind == "new_bundle":
            self._keep_bundle(message.new_bundle.ca_bundle)

    def _hello(self) -> pb.Hello:
        return pb.Hello(
            wire_version=WIRE_VERSION,
            fedge_version=fedge.__version__,
            tasks=[pb.OfferedTask(name=name, digest=offer.digest) for name, offer in self._offers.items()],
            tags=self._settings.tags,
            working_on=[*self._workshop.held(), *self._outbox.waiting()],
            cores=os.cpu_count() or 1,
            memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            bundle_sha256=self._identity.bundle_sha256,
        )

    # --- certificates

    def _keep_bundle(self, bundle: bytes) -> None:
        if not bundle:
            return
        try:
            self._identity = self._identity.with_bundle(bundle)
            log.info("the server's certificate authorities have changed; kept")
        except FedgeError as error:
            log.warning("the server's certificate authorities cannot be kept: %s", error)

    async def _renew_if_due(self) -> bool:
        """Whether there is a new certificate."""
        if not self._identity.needs_renewal(time.time()):
            return False
        self._identity = await asyncio.to_thread(renew, self._identity)
        log.info("certificate renewed until %s", _day(self._identity.not_after))
        return True

    async def _renew_before_connecting(self) -> None:
        """Renew when it is time; a certificate that is still valid will do where that fails."""
        try:
            await self._renew_if_due()
        except FedgeError as error:
            if self._identity.expired(time.time()):
                raise
            log.warning("certificate cannot be renewed yet: %s", error)

    async def _renew_refused(self, fault: str) -> tuple[str, bool]:
        """The server refuses the certificate: a new one may mend that, but is not asked for each time."""
        if time.monotonic() - self._renewed < REFUSED_DELAY_S / 2:
            return fault, True
        self._renewed = time.monotonic()
        try:
            self._identity = await asyncio.to_thread(renew, self._identity)
        except IdentityError as error:
            return f"{fault}; {error}", True
        except FedgeError as error:
            return f"{fault}; {error}", False
        return f"{fault}; certificate renewed until {_day(self._identity.not_after)}", False

    async def _renew_in_time(self, link: Link) -> None:
        """Renew while connected, then end the connection: the next one shows the new certificate."""
        delay = RENEWAL_CHECK_S
        while True:
            await asyncio.sleep(delay)
            try:
                if await self._renew_if_due():
                    await link.close()
            except FedgeError as error:
                log.warning("certificate cannot be renewed yet: %s", error)
                delay = REFUSED_DELAY_S

    # --- answers

    async def _send_all(self) -> None:
        """Send what waits in the outbox, for ever."""
        attempt = 0
        while True:
            await self._to_send.wait()
            self._to_send.clear()
            link = await self._linked.get()
            sent = [await self._send(link, message_id) for message_id in self._outbox.waiting()]
            attempt = 0 if all(sent) else attempt + 1
            self._status.show(outbox=len(self._outbox.waiting()))
            if attempt:
                self._to_send.set()
                await asyncio.sleep(backoff(attempt, self._settings.link.backoff_max_s, self._rng))

    async def _send(self, link: Link, message_id: str) -> bool:
        """Send an answer; True when it need not be sent again."""
        try:
            header, result = self._outbox.get(message_id)
            found = result.content.object
            path = self._outbox.path_of(message_id, found) if found.size else None
            reply = await link.submit(header, found, path)
        except Closed:
            reply = pb.SubmitReply(outcome=pb.SubmitReply.TOO_LATE, reason="not wanted any more")
        except FormatError as error:
            log.warning("%s; dropped", error)
            self._outbox.drop(message_id)
            return True
        except grpc.RpcError as error:
            if error.code() not in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT):
                log.info("answer to %s: %s; kept", message_id, said(error))
                return False
            reply = pb.SubmitReply(outcome=pb.SubmitReply.REFUSED, reason=said(error))
        except OSError:
            return False
        if reply.outcome in (pb.SubmitReply.INCOMPLETE, pb.SubmitReply.OUTCOME_UNSPECIFIED):
            return False
        if reply.outcome != pb.SubmitReply.ACCEPTED:
            name = pb.SubmitReply.Outcome.Name(reply.outcome)
            log.info("answer to %s: %s (%s); dropped", message_id, name, reply.reason[:200])
        self._outbox.drop(message_id)
        return True

    # --- what others see

    def _show(self, state: str, detail: str, **facts: object) -> None:
        self._status.show(state=state, detail=detail, certificate_not_after=self._identity.not_after, **facts)
        self._status.write()
        status.notify(f"STATUS={state} {detail}".strip())

    def _work_changed(self) -> None:
        self._last_work = time.monotonic()
        waiting = self._outbox.waiting()
        self._status.show(working=self._workshop.held(), outbox=len(waiting))
        if waiting:
            self._to_send.set()

    def _delivery_changed(self, words: str) -> None:
        if words != self._delivery:  # a question that brings nothing is no work
            self._last_work = time.monotonic()
        self._delivery = words
        self._status.show(delivery=words)

    def _child_changed(self, words: str) -> None:
        log.info("training process: %s", words)
        self._status.show(child=words)


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
