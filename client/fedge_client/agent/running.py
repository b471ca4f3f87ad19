"""`fedge-client run`: from a home folder to a running agent, and its clean end."""

from __future__ import annotations

import asyncio
import logging
import signal
from pathlib import Path

from fedge_client import said
from fedge_client.agent import settings, status
from fedge_client.agent.agent import Agent
from fedge_client.agent.identity import Identity
from fedge_client.agent.offers import digests_of

log = logging.getLogger("fedge.agent")


def run(home: Path, *, once: bool = False, log_format: str = "text") -> int:
    """Be the agent of this home until a signal ends it; returns the exit code.

    Raises:
        UserError: the device is not enrolled, or its settings are wrong.
        FedgeError: another agent runs here.
    """
    home = home.absolute()
    identity = Identity.open(home)
    found = settings.load(home / settings.FILE)
    said.start(log_format, log)
    with status.only_agent(home):
        digests = digests_of(found.tasks, home)
        if not found.tasks and not found.delivery.enabled:
            log.warning(
                "%s offers no task and takes no releases: there is nothing to do", home / settings.FILE
            )
        for name, digest in digests.items():
            log.info("offers task %s, digest %s", name, digest)
        return asyncio.run(_until_signal(Agent(home, found, digests, identity), once))


async def _until_signal(agent: Agent, once: bool) -> int:
    running = asyncio.ensure_future(agent.run(once=once))
    signals: list[int] = []

    def stop(number: int) -> None:
        signals.append(number)
        running.cancel()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop, number)
    try:
        return await running
    except asyncio.CancelledError:
        if not signals:
            raise
        status.notify("STOPPING=1")
        log.info("stopped")
        return 0
