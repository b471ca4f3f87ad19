"""Keep this device's release up to date: ask which version it is to have, let it be installed, report.

The question waits at the server until there is an answer (a long poll over the agent's connection). The
installation runs in a process of its own, beside training and at a lower priority. Nothing that happens to a
release ends the agent: what fails is tried again after a random time that doubles.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import grpc

from fedge.errors import FedgeError, FormatError
from fedge.logs import security
from fedge_client.agent.connection import Link, backoff, said
from fedge_client.agent.figures import COUNTED
from fedge_client.agent.settings import AgentSettings
from fedge_client.agent.standing import Done, standing
from fedge_client.agent.work import Linked
from fedge_client.answers import tally
from fedge_client.delivery import MAX_REPORTS, Report, Told
from fedge_client.device import Device, exists
from fedge_client.reports import Reports

LIMIT_S: Final = 3600.0  # of one installation: its download goes on in the next one
ABSENT_S: Final = 600.0  # before a server without releases is asked again, about
NOT_YET_S: Final = 60.0  # between looks whether this device has been given a root

log = logging.getLogger("fedge.agent")


class Keeper:
    """Asks, installs and reports, for as long as the agent runs."""

    def __init__(
        self, home: Path, settings: AgentSettings, *, linked: Linked, changed: Callable[[str], None]
    ) -> None:
        """Nothing is asked yet.

        Args:
            home: of the device.
            settings: its `agent.toml`.
            linked: the connection of the moment.
            changed: is told, in a few words, what the delivery does now.
        """
        self._home, self._settings, self._tags = home, settings.delivery, settings.tags
        self._linked, self._changed = linked, changed
        self._reports = Reports(home)
        self._rng = random.Random()  # noqa: S311 - spreads devices over time, protects nothing
        self._told = 0  # the server's last answer that was dealt with; it waits for another one
        self._followed = (0, 0)  # versions of root and tier's role that an installation has looked at
        self._looked_at = 0  # version that it left running, whether or not the disk took its reports
        self._retry_at = float("inf")  # when a release that was refused here is asked for again
        self.is_busy = settings.delivery.enabled  # until it has asked once and has nothing to do

    async def run(self) -> None:
        """Keep up, for ever."""
        if not self._settings.enabled:
            self._changed("off")
            await asyncio.Event().wait()
        attempt = 0
        while True:
            started, delay = time.monotonic(), 0.0
            try:
                delay = await self._once()
                attempt = 0
            except (FedgeError, OSError, grpc.RpcError) as error:
                attempt += 1
                delay = self._pause(error, attempt)
            except Exception:  # a release must not end the agent, whatever it does
                attempt += 1
                log.exception("delivery")
                delay = self._pause(FedgeError("an internal fault"), attempt)
            # A server that answers at once each time is not asked more than once a second.
            await asyncio.sleep(max(delay, started + 1.0 - time.monotonic(), 0.0))

    def _pause(self, error: Exception, attempt: int) -> float:
        """Seconds until the next attempt after this error."""
        self.is_busy = False
        if isinstance(error, grpc.RpcError) and error.code() is grpc.StatusCode.UNIMPLEMENTED:
            self._changed("the server has no releases")
            return self._rng.uniform(ABSENT_S / 2, ABSENT_S)
        words = said(error) if isinstance(error, grpc.RpcError) else str(error)
        delay = backoff(attempt, self._settings.poll_s, self._rng)
        self._changed(f"tries again: {words}"[:300])
        log.info("delivery: %s; next attempt in %.1f s", words, delay)
        return delay

    async def _once(self) -> float:
        """Ask once and do what the answer says; returns the seconds to wait before the next question.

        Raises:
            FedgeError, OSError, grpc.RpcError: the connection broke, or the disk refuses something.
        """
        if not exists(self._home):
            self.is_busy = False
            self._changed("waits: the server has given this device no root")
            return NOT_YET_S
        device, link = Device.open(self._home), await self._linked.get()
        self._note_confidence(device)
        await self._send(link)
        first = self.is_busy  # it looks whether there is something now; only then it waits
        answer = await link.poll(
            standing(device, told=self._told, tags=self._tags), 0.0 if first else self._wait_s()
        )
        if not await self._act(device, answer):
            self.is_busy = False
            self._changed("up to date" if not answer.version else f"release {answer.version} is not taken")
            return 0.0 if first else min(answer.again_s, self._settings.poll_s)
        await self._send(link)
        return 0.0

    def _wait_s(self) -> float:
        """How long the next question may wait at the server."""
        return min(self._settings.poll_s, max(self._retry_at - time.monotonic(), 1.0))

    async def _act(self, device: Device, answer: Told) -> bool:
        """Whether there was something to do.

        Raises:
            FedgeError: it could not be done now.
        """
        if time.monotonic() >= self._retry_at:
            self._told, self._retry_at = 0, float("inf")
            return True  # ask again, as if for the first time
        here = standing(device)
        roles = (answer.root, answer.tier_role)
        news = (here.root < answer.root or here.tier_role < answer.tier_role) and roles != self._followed
        unsaid = here.has != self._looked_at and not self._reports.has_said(here.has, "installed")
        version = answer.version if answer.version not in (self._told, here.has) else 0
        if not (version or news or (here.has and unsaid)):
            return False
        self._changed(f"installs release {version}" if version else "follows the repository's metadata")
        done = await self._installed(version)
        outcome = "refused" if done.refused else "failed" if done.fault else "installed"
        if version or done.changed or done.refused:  # what only followed metadata installed nothing
            COUNTED.add("fedge_agent_installs_total", outcome)
        if done.refused:
            about = {"version": version or None, "reason": done.refused}
            security("release_refused", "delivery: refused: %s", done.fault, **about)
        if done.fault and done.passing:
            raise FedgeError(done.fault)
        self._followed, self._looked_at = roles, done.version
        self._judge(version, done)
        return True

    def _judge(self, version: int, done: Done) -> None:
        if done.changed:
            log.info("delivery: release %d runs", done.version, extra={"version": done.version})
        if version:
            self._told = version
        if done.fault:
            again = self._rng.uniform(self._settings.retry_s / 2, self._settings.retry_s)
            self._retry_at = time.monotonic() + again
            about = {"version": version}
            log.warning("delivery: %s; tried again in %.0f s", done.fault, again, extra=about)

    async def _installed(self, version: int) -> Done:
        """Let a process of its own do it; killed with this task.

        Raises:
            FedgeError: it ended without a result, or not in time.
        """
        limits = self._settings
        numbers = (version, os.getpid(), limits.max_memory_bytes, limits.nice)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "fedge_client.agent.installation", str(self._home)),
            *map(str, numbers),
            stdout=asyncio.subprocess.PIPE,
            stdin=asyncio.subprocess.DEVNULL,
        )
        if process.stdout is None:
            raise AssertionError("it is a pipe")
        try:
            async with asyncio.timeout(LIMIT_S):
                line = await process.stdout.readline()
                code = await process.wait()
        except TimeoutError as error:
            raise FedgeError(f"the installation took over {LIMIT_S:g} s; it goes on where it was") from error
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        try:
            return Done.from_line(line)
        except FormatError as error:
            raise FedgeError(f"the installation ended with {code}: {error}") from error

    # --- reports

    def _note_confidence(self, device: Device) -> None:
        """How sure the release is of its answers, once there are enough."""
        answers, runs = tally(self._home), device.store.state().counted
        enough = 0 < self._settings.answers <= answers.answers
        if enough and runs is not None and answers.version == runs.version:
            with contextlib.suppress(OSError):  # a full disk must not keep a device from asking
                self._reports.add([Report(answers.version, "confidence", answers.mean)])

    async def _send(self, link: Link) -> None:
        waiting = self._reports.waiting()[:MAX_REPORTS]
        if not waiting:
            return
        for refused in await link.note(waiting):
            log.warning("delivery: the server refuses a report: %s", refused.reason)
        with contextlib.suppress(OSError):  # then they are sent again, and count once
            self._reports.drop(waiting)
